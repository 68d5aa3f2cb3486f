"""`collm generate` from the command line."""

from __future__ import annotations

import io
import json

import pytest

from collm.cli import main
from tests.conftest import save_plain, tiny_collm, tiny_model


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pair")
    base = save_plain(tiny_collm("llama"), folder / "base")
    assistant = save_plain(tiny_model("llama", seed=10), folder / "assistant")
    return [base, "--assistant", assistant, "--max_new_tokens", "8"]


def lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line]


def test_prompts_come_from_arguments_a_file_or_standard_input(pair, tmp_path, monkeypatch, capsys):
    assert main(["generate", *pair, "w1 w2", "w3", "--format", "json"]) == 0
    given = [json.loads(line) for line in lines(capsys)]
    assert [r["prompt"] for r in given] == ["w1 w2", "w3"]
    assert all(len(r["tokens"]) == len(r["source"]) == len(r["deferral_probs"]) > 0 for r in given)
    file = tmp_path / "prompts.txt"
    file.write_text('w1 w2\n\n{"messages": [{"role": "user", "content": "w3"}]}\n')
    main(["generate", *pair, "--file", str(file), "--format", "json", "--batch_size", "2"])
    assert [json.loads(line) for line in lines(capsys)] == given
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\nw3\n"))
    main(["generate", *pair, "--format", "json", "--no_speculation"])
    assert [json.loads(line) for line in lines(capsys)] == given


def test_formats(pair, capsys):
    main(["generate", *pair, "w1", "--format", "plain"])
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    main(["generate", *pair, "w1", "--format", "color"])
    colored = capsys.readouterr().out
    assert "\x1b" in colored
    assert "base" in colored
    assert main(["generate", *pair, "w1", "--format", "colour"]) == 2
    assert 'Did you mean "color"' in capsys.readouterr().err


def test_options_reach_generate(pair, capsys):
    for threshold, writer in (("1.0", 0), ("-1.0", 1)):
        main(["generate", *pair, "w1", "--format", "json", "--threshold", threshold])
        assert set(json.loads(capsys.readouterr().out)["source"]) == {writer}
    main(["generate", *pair, "w1", "--format", "json", "--router", "random:rate=1.0", "--sample", "--seed", "3"])
    assert set(json.loads(capsys.readouterr().out)["source"]) == {1}
    main(["generate", pair[0], "--max_new_tokens", "4", "w1", "--format", "json"])
    assert set(json.loads(capsys.readouterr().out)["source"]) == {0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--router", "entropi:cut=1"], 'Did you mean "entropy"'),
        (["--deferral_rate", "0.2"], "collm calibrate"),
        (["--file", "/nowhere/prompts.txt"], "cannot be read"),
        (["--treshold", "0.5"], 'Did you mean "--threshold"'),
    ],
)
def test_errors_are_one_line_and_exit_code_2(pair, options, message, capsys):
    assert main(["generate", *pair, "w1", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_missing_assistant_is_named(pair, capsys):
    assert main(["generate", pair[0], "--assistant", "/nowhere/model", "w1"]) == 2
    assert "/nowhere/model" in capsys.readouterr().err
