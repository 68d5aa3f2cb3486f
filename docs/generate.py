"""
Write the generated pages: docs/reference/cli.md from each command's `--help`, docs/reference/api.md from docstrings.

    python docs/generate.py        (or: make docs; tests/test_docs.py says when it has to be run again)
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import collm
from collm import cli
from collm.commands import command_parser

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate.py; do not edit. -->"
# Exports by what a reader looks for.
SECTIONS = {
    "Model": ["CoLLMForCausalLM", "DeferralConfig"],
    "Generation": [
        "CollaborativeGenerationMixin.generate",
        "CollaborativeOutput",
        "SourceStreamer",
        "CollaborativeLogitsProcessor",
    ],
    "Data": ["format_rows", "score_dataset", "load_scored", "DataCollatorForCoLLM"],
    "Training": ["ZInitializationCallback", "z_initialise", "train_head"],
    "Calibration": ["calibrate_rates"],
    "Tensors": [
        "marginal_likelihood_loss",
        "weak_supervision_loss",
        "deferral_labels",
        "deferral_probabilities",
        "uncertainty_features",
    ],
}


def cli_page() -> str:
    """The command line, as `--help` prints it."""
    parts = [NOTE, "# Command line", fenced("$ collm --help\n" + cli.usage())]
    for name, (module, _) in cli.COMMANDS.items():
        parser = command_parser(name, importlib.import_module(f"collm.commands.{module}"))
        parts += [f"## collm {name}", fenced(parser.format_help())]
    return "\n\n".join(parts) + "\n"


def api_page() -> str:
    """Signature and docstring of every export."""
    parts = [NOTE, "# Python", "Everything here is imported as `from collm import ...`."]
    for section, names in SECTIONS.items():
        parts.append(f"## {section}")
        for name in names:
            thing: object = collm
            for attribute in name.split("."):
                thing = getattr(thing, attribute)
            parts += [f"### {name}", fenced(f"{name}{signature(thing)}", "python"), fenced(inspect.getdoc(thing) or "")]
    parts += ["## Errors", fenced(inspect.getdoc(importlib.import_module("collm.errors")) or "")]
    return "\n\n".join(parts) + "\n"


def signature(thing: object) -> str:
    """One parameter per line where there are many; a class that takes anything is shown without."""
    parameters = list(inspect.signature(thing).parameters.values())  # type: ignore[arg-type]
    if all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.name in ("config", "self") for p in parameters):
        return ""
    # Annotations are strings under `from __future__ import annotations`: shown without their quotes.
    # A default that is a function would show its address, another one in every run.
    shown = [re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(p)) for p in parameters]
    shown = [re.sub(r"<function (\S+) at 0x\w+>", r"\1", p) for p in shown]
    line = ", ".join(shown)
    return f"({line})" if len(line) <= 100 else "(\n" + "".join(f"    {p},\n" for p in shown) + ")"


def fenced(text: str, language: str = "text") -> str:
    return f"```{language}\n{text.strip()}\n```"


PAGES = {"cli.md": cli_page, "api.md": api_page}

if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")
        print(REFERENCE / name)
