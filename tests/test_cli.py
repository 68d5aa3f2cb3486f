"""The command line's framework: listing, help, options, YAML files, exit codes."""

from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Literal

import pytest

from collm import cli
from collm.commands import command_parser, execute
from collm.errors import DataFormatError


@dataclasses.dataclass
class Arguments:
    source: str = dataclasses.field(metadata={"help": "what to read, 100% of it", "positional": True})
    others: list[str] = dataclasses.field(default_factory=list, metadata={"help": "more", "positional": True})
    threshold: float = dataclasses.field(default=0.5, metadata={"help": "above it the assistant writes"})
    batch_size: int = dataclasses.field(default=8, metadata={"help": "rows at once"})
    names: list[str] = dataclasses.field(default_factory=list, metadata={"help": "several"})
    keys: list[str] = dataclasses.field(default_factory=list, metadata={"help": "or again", "action": "extend"})
    mode: Literal["plain", "json"] = dataclasses.field(default="plain", metadata={"help": "output"})
    verbose: bool = dataclasses.field(default=False, metadata={"help": "say more"})
    limit: int | None = dataclasses.field(default=None, metadata={"help": "stop early"})


def make_command(run=lambda arguments: 0, **attributes):
    return SimpleNamespace(
        HELP="try the framework", EXAMPLE="collm try data", Arguments=Arguments, run=run, **attributes
    )


def parsed(*argv: str) -> Arguments:
    seen = []
    assert execute("try", make_command(lambda arguments: seen.append(arguments) or 0), argv) == 0
    return seen[0]


def test_fields_become_options_and_positionals():
    assert parsed("data") == Arguments("data")
    assert parsed("data", "x", "y", "--batch-size", "2", "--verbose", "--limit", "3") == Arguments(
        "data", ["x", "y"], batch_size=2, verbose=True, limit=3
    )
    expected = Arguments("data", names=["a", "b"], batch_size=2)
    assert parsed("--names", "a", "b", "--batch_size=2", "--", "data") == expected


def test_yaml_file_supplies_options_and_the_command_line_wins(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("source: data\nthreshold: -0.25\nnames: [a, -b]\nverbose: true\nbatch_size: 4\nlimit: null\n")
    from_file = Arguments("data", threshold=-0.25, names=["a", "-b"], verbose=True, batch_size=4)
    assert parsed("--config", str(path)) == from_file
    assert parsed("--config", str(path), "--batch-size", "9") == dataclasses.replace(from_file, batch_size=9)
    assert parsed("elsewhere", "--config", str(path)).source == "elsewhere"
    path.write_text("source: data\nkeys: [old]\nnames: [old]\n")
    assert parsed("--config", str(path)).keys == ["old"]
    typed = parsed("--config", str(path), "--keys", "new", "--keys=newer", "--names", "new")
    assert (typed.keys, typed.names) == (["new", "newer"], ["new"])


def test_config_file_as_positional(tmp_path):
    @dataclasses.dataclass
    class FileArguments:
        settings: str = dataclasses.field(metadata={"help": "YAML", "positional": True, "config": True})
        model: str = dataclasses.field(metadata={"help": "required, here from the file"})
        rate: float = dataclasses.field(default=0.1, metadata={"help": "a number"})

    path = tmp_path / "train.yaml"
    path.write_text("model: tiny\nrate: 1e-5\n")
    globals()["FileArguments"] = FileArguments  # HfArgumentParser resolves annotations by name
    seen = []
    command = make_command(lambda arguments: seen.append(arguments) or 0)
    command.Arguments = FileArguments
    assert execute("train", command, [str(path), "--rate", "0.3"]) == 0
    assert execute("train", command, [str(path)]) == 0
    assert seen == [FileArguments(str(path), "tiny", 0.3), FileArguments(str(path), "tiny", 1e-5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("treshold: 1", "unknown key 'treshold'. Did you mean \"threshold\"?"),
        ("- a", "has to be a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_yaml_says_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "options.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"options\.yaml") as raised:
        parsed("data", "--config", str(path))
    assert message in str(raised.value)


def test_yaml_values_are_checked_like_typed_ones(tmp_path, capsys):
    path = tmp_path / "options.yaml"
    path.write_text("mode: xml\n")
    with pytest.raises(SystemExit) as raised:
        parsed("data", "--config", str(path))
    assert raised.value.code == 2
    assert "options.yaml" in capsys.readouterr().err


def test_missing_yaml_file_is_named():
    with pytest.raises(ValueError, match=r"no configuration file 'nowhere\.yaml'"):
        parsed("data", "--config", "nowhere.yaml")


def test_unknown_option_gets_a_suggestion(capsys):
    with pytest.raises(SystemExit) as raised:
        parsed("data", "--treshold", "0.3")
    assert raised.value.code == 2
    assert "unknown argument '--treshold'. Did you mean \"--threshold\"?" in capsys.readouterr().err


def test_options_that_do_not_go_together_are_bad_input(tmp_path, capsys):
    options = ["--load-best-model-at-end", "true", "--save-strategy", "steps", "--eval-strategy", "epoch", "--use-cpu"]
    code = cli.main(["train", "--model", "m", "--data", "d", "--output-dir", str(tmp_path), *options])
    assert code == cli.BAD_INPUT
    assert "strategy to match" in capsys.readouterr().err


def test_passthrough_command_gets_what_no_field_knows():
    seen = []
    command = make_command(lambda arguments, remaining: seen.append((arguments, remaining)) or 0, PASSTHROUGH=True)
    assert execute("try", command, ["data", "--tasks", "gsm8k", "--verbose"]) == 0
    assert seen == [(Arguments("data", verbose=True), ["--tasks", "gsm8k"])]


def test_help_shows_example_defaults_and_percent_signs():
    text = command_parser("try", make_command()).format_help()
    assert "usage: collm try SOURCE [OTHERS ...] [options]" in text
    assert "Try the framework." in text
    assert "100% of it" in text
    assert "--batch-size BATCH_SIZE" in text
    assert "--batch_size" not in text
    assert "rows at once (default: 8)" in text
    assert "example:\n  collm try data" in text


def test_exit_codes(monkeypatch, capsys):
    def use(run):
        monkeypatch.setitem(cli.COMMANDS, "try", ("try_", "try the framework"))
        monkeypatch.setitem(sys.modules, "collm.commands.try_", make_command(run))
        return cli.main(["try", "data"])

    def fail(error):
        raise error

    assert use(lambda arguments: 0) == 0
    assert use(lambda arguments: 3) == 3
    assert use(lambda arguments: fail(DataFormatError("row 3 has no prompt"))) == 2
    assert capsys.readouterr().err == "collm try: row 3 has no prompt\n"
    assert use(lambda arguments: fail(KeyboardInterrupt())) == 130
    with pytest.raises(SystemExit) as ended:  # so that what runs beside it, engines above all, is ended on the way out
        use(lambda arguments: os.kill(os.getpid(), signal.SIGTERM))
    assert ended.value.code == 143
    assert use(lambda arguments: fail(FileNotFoundError(2, "No such file or directory", "data"))) == 1
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        use(lambda arguments: 1 // 0)


def test_unknown_command_gets_a_suggestion(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "score", ("score", ""))
    assert cli.main(["scroe"]) == 2
    assert "unknown command 'scroe'. Did you mean \"score\"?" in capsys.readouterr().err


def test_listing_imports_no_torch():
    script = (
        "import sys; from collm import cli; code = cli.main(['--help']) or cli.main(['--version']);"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for name, (_, line) in cli.COMMANDS.items():
        assert f"{name} " in result.stdout
        assert line in result.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_and_example(name, capsys):
    module, line = cli.COMMANDS[name]
    command = importlib.import_module(f"collm.commands.{module}")
    assert line == command.HELP
    with pytest.raises(SystemExit) as raised:
        cli.main([name, "--help"])
    assert raised.value.code == 0
    shown = capsys.readouterr().out
    assert f"collm {name}" in command.EXAMPLE
    assert command.EXAMPLE.strip().splitlines()[0] in shown


def test_every_command_module_is_listed():
    import pkgutil

    import collm.commands

    modules = {module.name for module in pkgutil.iter_modules(collm.commands.__path__)}
    assert modules == {module for module, _ in cli.COMMANDS.values()}
