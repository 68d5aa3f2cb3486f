from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
from conftest import save_plain, tiny_collm

from collm.cli import main
from collm.errors import AssistantError, ConfigurationError
from collm.evaluation.runner import ModelWriter, generate_all, make_problems
from collm.evaluation.server import ServerWriter
from tests.serving.running import running

ROWS = [{"prompt": f"w{i} " * (1 + i % 3) + "="} for i in range(5)]


@pytest.fixture(scope="module")
def server():
    with running() as one:
        yield one


@pytest.mark.parametrize("options", [{"threshold": 0.5}, {"deferral_rate": 0.5}, {"router": "entropy:cut=1.0"}])
def test_a_server_writes_what_generate_writes(server, tokenizer, options):
    problems = make_problems(ROWS, tokenizer)
    threshold = {"threshold": 0.4} if "deferral_rate" in options else options  # by the server's table
    here = ModelWriter(server.base, tokenizer, server.assistants, threshold, 12)
    there = ServerWriter(server.url, tokenizer, options, 12)
    assert there.model == "tiny"
    for mine, theirs in zip(generate_all(here, problems), generate_all(there, problems, batch_size=3), strict=True):
        assert theirs.deferral_probs == pytest.approx(mine.deferral_probs, abs=1e-4)
        same = {"deferral_probs": [], "seconds": 0.0}
        assert dataclasses.replace(theirs, **same) == dataclasses.replace(mine, **same)
    there.close()


def test_refusals_are_the_servers_own_words(server, tokenizer):
    problems = make_problems(ROWS, tokenizer)
    there = ServerWriter(server.url, tokenizer, {"deferral_rate": 0.9}, 4)
    with contextlib.closing(there), pytest.raises(AssistantError, match="refuses /completions"):
        generate_all(there, problems)
    with pytest.raises(AssistantError, match="does not answer"):
        ServerWriter("http://127.0.0.1:9", tokenizer, {}, 4)


def test_the_base_alone_never_asks_and_nothing_is_ignored(server, tokenizer, tmp_path, capsys):
    save_plain(tiny_collm(), tmp_path / "base")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({**row, "answer": "1"}) + "\n" for row in ROWS))

    def evaluate(output, *options):
        common = ["eval", str(tmp_path / "base"), "--server", server.url, "--data", str(tmp_path / "d.jsonl")]
        few = ["--metric", "exact_match", "--max-new-tokens", "12", "--output", str(tmp_path / output)]
        return main([*common, *few, *options])

    assert evaluate("both", "--router", "always") == evaluate("base", "--alone", "base") == 0
    both, base = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("both", "base"))
    assert (both["deferral_rate"], base["deferral_rate"]) == (1.0, 0.0)
    assert base["settings"]["names"] == ["base"]
    capsys.readouterr()
    assert evaluate("x", "--alone", "assistant") == evaluate("x", "--combiner", "mixture") == 2
    said = capsys.readouterr().err
    assert "--alone assistant" in said
    assert "whole distributions" in said


def test_an_answer_without_token_ids_is_refused(server, tokenizer, monkeypatch):
    there = ServerWriter(server.url, tokenizer, {}, 4)
    monkeypatch.setattr(there, "_ask", lambda problem: {"text": "1", "finish_reason": "stop"})
    with contextlib.closing(there), pytest.raises(AssistantError, match="without token_ids"):
        generate_all(there, make_problems(ROWS, tokenizer))
    with pytest.raises(ConfigurationError, match="whole distributions"):
        ServerWriter(server.url, tokenizer, {"combiner": "mixture"}, 4)
