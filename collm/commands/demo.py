"""`collm demo`: two tiny models that need each other, trained and put together in a few minutes, offline."""

from __future__ import annotations

from dataclasses import dataclass, field

HELP = "train two tiny models that need each other and watch them write together; offline, a few minutes"
EXAMPLE = """
collm demo
collm demo --seed 7 --output demo-7
"""


@dataclass
class Arguments:
    """Options of `collm demo`."""

    seed: int = field(default=0, metadata={"help": "of the weights, the training text and the problems"})
    output: str = field(default="collm-demo", metadata={"help": "new folder for models, data and report.html"})


def run(arguments: Arguments) -> int:
    """Run it, print the table and a few solutions, write the page; the last line names the page."""
    import logging
    import sys
    from pathlib import Path

    import datasets
    import transformers

    from collm.demo.pipeline import run as run_demo
    from collm.demo.report import page, table
    from collm.errors import ConfigurationError
    from collm.reporting.terminal import color_tokens

    output = Path(arguments.output)
    if output.exists() and any(output.iterdir()):
        raise ConfigurationError(f"{output} is not empty: name a new folder with --output, or remove it.")
    # Progress bars of the stages are enough: no word about each file, or about a head that is meant to be new.
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.basicConfig(level=logging.INFO, format="   %(message)s", stream=sys.stderr)
    result = run_demo(output, arguments.seed, say=lambda text: print(text, file=sys.stderr, flush=True))
    for view in result.views:
        print(f"\n{view.prompt}{color_tokens(view)}")
    print(f"\n{table(result)}\n")
    print(page(result, output / "report.html"))
    return 0
