"""`collm generate` from the command line."""

from __future__ import annotations

import io
import json

import pytest

from collm.cli import main
from collm.commands.generate import Arguments, read_prompts
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
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--sample", "--temperature", "0"], "--temperature must be above 0"),
        (["--raw", "--system", "w2"], "no place for --system"),
        (["--router", "entropy:cut=abc"], "cut of the router \"entropy\" must be a number, not 'abc'"),
        (["--router", '{"name": []}'], "There is no router"),
        (["--router", "entropy:cut=NaN"], "must be a number"),
        (["--router", "scheduled:steps=1.5"], "must be a whole number"),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": 5}', "must be a text"),
        (b'{"messages": []}', "must be a text"),
        (b'{"messages": [{"role": "user"}]}', "must be a text"),
        ("déjà".encode("latin-1"), "not UTF-8"),
    ],
)
def test_prompts_that_are_none_are_named(pair, tmp_path, content, message, capsys):
    (tmp_path / "prompts").write_bytes(content)
    assert main(["generate", *pair, "--file", str(tmp_path / "prompts")]) == 2
    assert message in capsys.readouterr().err


def test_only_a_line_feed_ends_a_prompt(tmp_path):
    (tmp_path / "prompts").write_text('{"prompt": "first\u2028second\u0085third"}\r\nw1\n', encoding="utf-8")
    chats = read_prompts(Arguments("checkpoint", file=str(tmp_path / "prompts")))
    assert [chat[0]["content"] for chat in chats] == ["first\u2028second\u0085third", "w1"]


def test_without_an_assistant_nothing_is_asked_for_one(pair, capsys):
    assert main(["generate", pair[0], "w1", "--deferral-rate", "0.2"]) == 2
    assert "--deferral-rate needs an --assistant" in capsys.readouterr().err
