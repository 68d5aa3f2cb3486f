"""The demonstration runs through the public functions, and (slow) shows what it promises."""

from __future__ import annotations

import pytest

from collm import cli
from collm.demo import models, pipeline
from collm.demo.report import page, table


@pytest.fixture
def small(monkeypatch):
    """Sizes at which nothing is learned and everything is run."""
    monkeypatch.setattr(models, "BASE_STEPS", 4)
    monkeypatch.setattr(models, "ASSISTANT_STEPS", 4)
    monkeypatch.setattr(pipeline, "TRAINING_PROBLEMS", 40)
    monkeypatch.setattr(pipeline, "UNSEEN_PROBLEMS", 6)
    monkeypatch.setattr(pipeline, "MAX_NEW_TOKENS", 8)


def test_every_stage_runs_and_is_reported(small, tmp_path):
    said = []
    result = pipeline.run(tmp_path / "demo", seed=3, say=said.append, progress=False)
    assert [row.name for row in result.rows] == [
        "base", "fine-tuned base", "assistant", "random deferral", "collaboration",
    ]  # fmt: skip
    assert [text.split(".")[0] for text in said] == ["1", "2", "3", "4", "5", "6"]
    assert len(result.seconds) == 6
    assert all(len(row.solved) == 6 for row in result.rows)
    assert all(name in table(result) for name in ("collaboration", "deferred tokens", "95% interval"))
    html = page(result, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Two tiny models that need each other" in html
    assert result.views[0].prompt.split(".")[0] in html


def test_command_refuses_a_folder_with_something_in_it(tmp_path, capsys):
    (tmp_path / "something").write_text("")
    assert cli.main(["demo", "--output", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_collaboration_beats_every_single_model(seed, tmp_path):
    rows = {row.name: row for row in pipeline.run(tmp_path / "demo", seed, say=lambda _: None, progress=False).rows}
    assert rows["collaboration"].exact >= 0.9
    assert rows["collaboration"].deferred <= 0.35
    assert max(rows[name].exact for name in ("base", "fine-tuned base", "assistant")) <= 0.5
    assert rows["random deferral"].exact <= 0.6
    assert abs(rows["random deferral"].deferred - rows["collaboration"].deferred) < 0.02
