"""What is generated is up to date, what is linked exists, and the README's program runs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from collm.demo import models, pipeline
from collm.demo.problems import make_problem, make_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def generated_pages() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: page() for name, page in module.PAGES.items()}


@pytest.mark.skipif(
    f"transformers=={transformers.__version__}\n" not in (ROOT / "constraints.txt").read_text(),
    reason="`collm train --help` shows transformers' own options: compared under the version of constraints.txt",
)
def test_reference_is_what_help_and_docstrings_say():
    for name, page in generated_pages().items():
        assert (ROOT / "docs/reference" / name).read_text(encoding="utf-8") == page, "run `make docs` and commit"


def test_every_export_is_in_the_reference():
    import collm

    page = (ROOT / "docs/reference/api.md").read_text(encoding="utf-8")
    assert [name for name in collm.__all__ if name != "__version__" and name not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_inside_the_repository_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) if "://" not in t]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_readme_program_runs(tmp_path, monkeypatch):
    # The two models that `make demo` leaves behind, hardly trained: the program is the same.
    monkeypatch.setattr(models, "BASE_STEPS", 4)
    monkeypatch.setattr(models, "ASSISTANT_STEPS", 4)
    folder, tokenizer = tmp_path / "collm-demo", make_tokenizer()
    pipeline.save(models.make_base(tokenizer, 0, progress=False), tokenizer, str(folder / "base"))
    pipeline.save(models.make_assistant(tokenizer, 0, progress=False), tokenizer, str(folder / "assistant"))
    rng = pipeline.random.Random(0)
    pipeline.write_problems([make_problem(rng) for _ in range(64)], folder / "problems.jsonl")

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", blocks[0]], cwd=tmp_path, capture_output=True, text=True, env=one_thread
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *_, deferred = done.stdout.strip().splitlines()
    assert isinstance(eval(deferred), list)
    assert (tmp_path / "runs/deferral-checkpoint/config.json").is_file()
