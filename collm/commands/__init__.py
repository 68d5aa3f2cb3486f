"""
What every command shares: a dataclass is its command line.

A command is a module of this package with

- `HELP`: one line;
- `EXAMPLE`: a few lines of shell, shown by `--help`;
- `Arguments`: a dataclass (or a tuple of them). A field is an option, its default the default; `metadata["help"]`
  describes it; `metadata={"positional": True}` makes it positional (a list takes any number);
- `run(arguments, ...) -> int`: the exit code. It gets one object per dataclass; with `PASSTHROUGH = True` in the
  module, also the list of arguments that no field knows.

Any command reads its options from a YAML file too: `--config FILE.yaml`, or the positional field marked
`metadata={"positional": True, "config": True}`. Keys are the names of the fields; the command line wins over the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, get_args, get_origin

import yaml
from transformers.hf_argparser import HfArgumentParser

from collm.errors import ConfigurationError, did_you_mean


def execute(name: str, command: ModuleType, argv: Sequence[str]) -> int:
    """Parse `argv` for the command module and run it; returns the exit code."""
    parser = command_parser(name, command)
    *arguments, remaining = parser.parse(argv)
    if getattr(command, "PASSTHROUGH", False):
        return command.run(*arguments, remaining)
    if remaining:
        unknown = next((r for r in remaining if r.startswith("-")), remaining[0])
        hint = did_you_mean(unknown, parser.option_names()) if unknown.startswith("-") else ""
        parser.error(f"unknown argument {unknown!r}.{hint}")
    return command.run(*arguments)


def command_parser(name: str, command: ModuleType) -> CommandParser:
    """The parser of a command module; `parser.format_help()` is what `collm NAME --help` prints."""
    types = command.Arguments if isinstance(command.Arguments, tuple) else (command.Arguments,)
    return CommandParser(f"collm {name}", types, description=command.HELP, example=command.EXAMPLE)


class CommandParser(HfArgumentParser):
    """
    [`~transformers.HfArgumentParser`] with positional fields, `%` in help texts, a YAML file below the command line,
    and a help text that looks the same on every terminal and Python version.

    Args:
        prog (`str`): What the user types, `"collm score"`.
        types (`tuple[type, ...]`): Dataclasses to fill.
        description (`str`): One line.
        example (`str`): Lines of shell.
    """

    def __init__(self, prog: str, types: tuple[type, ...], description: str, example: str):
        fields = [field for kind in types for field in dataclasses.fields(kind)]
        config = [field.name for field in fields if field.metadata.get("config")]
        shown = " ".join(_usage_of(field) for field in fields if field.metadata.get("positional"))
        super().__init__(
            types,
            prog=prog,
            usage=f"{prog} {shown} [options]" if shown else f"{prog} [options]",
            description=description[:1].upper() + description[1:] + ".",
            epilog="example:\n" + "\n".join(f"  {line}" for line in example.strip().splitlines()),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self.config_field = config[0] if config else "config"
        if not config:
            self.add_argument("--config", metavar="FILE.yaml", help="options from a YAML file; the command line wins")

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        metadata = dict(field.metadata)
        config, positional = metadata.pop("config", False), metadata.pop("positional", False)
        one_each = metadata.pop("one_each", False)
        if "help" in metadata:
            metadata["help"] = re.sub(r"(?<!%)%(?![%(])", "%%", metadata["help"])
        if not positional:
            field.metadata = metadata  # type: ignore[assignment]
            HfArgumentParser._parse_dataclass_field(parser, field)
            if one_each:  # of an option given several times, so that it does not swallow the positionals behind it
                parser._actions[-1].nargs = 1
            field.metadata = {**metadata, "config": config, "one_each": one_each}  # type: ignore[assignment]
            return
        options: dict[str, Any] = {"help": metadata.get("help"), "metavar": _shown_name(field)}
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        kinds = [kind for kind in get_args(field.type) if kind is not type(None)]
        options["type"] = kinds[0] if kinds else field.type
        if get_origin(field.type) is list:
            options["nargs"] = "+" if required else "*"
        elif not required:
            options["nargs"] = "?"
        if not required:
            factory = field.default_factory
            options["default"] = field.default if factory is dataclasses.MISSING else factory()
        parser.add_argument(field.name, **options)

    def parse(self, argv: Sequence[str]) -> list[Any]:
        """
        Returns the filled dataclasses, in order, then the list of arguments that no field knows.

        Raises:
            [`~errors.ConfigurationError`]: values that do not go together, or not with this machine.
        """
        path = self._file_named_in(argv)
        if path is not None:
            self.set_file_defaults(Path(path), argv)
        namespace, remaining = self.parse_known_args(argv)
        values = vars(namespace)
        try:
            filled = [
                kind(**{field.name: values[field.name] for field in dataclasses.fields(kind) if field.init})
                for kind in self.dataclass_types
            ]
        except ValueError as error:  # what transformers' own arguments say about values that do not go together
            raise ConfigurationError(str(error)) from error
        return [*filled, remaining]

    def set_file_defaults(self, path: Path, argv: Sequence[str] = ()) -> None:
        """
        Make the values of a YAML file the defaults, converted and checked as if they had been typed. What `argv` says
        too is checked and left out: an option that adds to a list would add to the file's.

        Raises:
            [`~errors.ConfigurationError`]: the file is missing or no mapping, or has a key that no option has.
        """
        if not path.is_file():
            raise ConfigurationError(f"no configuration file {str(path)!r}")
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ConfigurationError(f"{path} is not YAML: {error}") from error
        if not isinstance(settings, dict):
            raise ConfigurationError(f"{path} has to be a mapping of option names to values")
        actions = {action.dest: action for action in self._actions if action.dest not in ("help", self.config_field)}
        for key, value in settings.items():
            if key not in actions:
                raise ConfigurationError(f"{path}: unknown key {key!r}.{did_you_mean(str(key), actions)}")
            action = actions[key]
            default = None if value is None else self._converted(action, value, path)
            if not any(word.partition("=")[0] in action.option_strings for word in argv):
                self.set_defaults(**{key: default})
            action.required = False
            if not action.option_strings:
                action.nargs = {None: "?", "+": "*"}.get(action.nargs, action.nargs)  # type: ignore[arg-type]

    def option_names(self) -> list[str]:
        """All spellings of all options."""
        return [name for action in self._actions for name in action.option_strings]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n`{self.prog} --help` shows the options.\n")
        raise AssertionError("argparse exits")

    def _file_named_in(self, argv: Sequence[str]) -> str | None:
        if self.config_field == "config" and "--config" in self.option_names():
            first_look = argparse.ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
            first_look.add_argument("--config")
            return first_look.parse_known_args(argv)[0].config
        # The file is a positional: read the whole line, leaving out what the file may still supply.
        required = [action for action in self._actions if action.required and action.option_strings]
        for action in required:
            action.required = False
        path = getattr(self.parse_known_args(argv)[0], self.config_field)
        for action in required:
            action.required = True
        return path

    def _converted(self, action: argparse.Action, value: Any, path: Path) -> Any:
        words = [_word(item) for item in value] if isinstance(value, list) else [_word(value)]
        single = argparse.ArgumentParser(prog=f"{self.prog}: {path}", add_help=False, usage=argparse.SUPPRESS)
        how: dict[str, Any] = {"action": "append", "default": []} if action.nargs in ("+", "*", 1) else {}
        single.add_argument(f"--{action.dest}", type=action.type or str, choices=action.choices, **how)
        return getattr(single.parse_args([f"--{action.dest}={word}" for word in words]), action.dest)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """100 columns everywhere, one spelling of each option (the one with hyphens), no empty defaults."""

    def __init__(self, prog: str):
        super().__init__(prog, width=100, max_help_position=32)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if "_" not in name]
        value = "" if action.nargs in (0, "?") else " " + self._format_args(action, action.dest.upper())
        return ", ".join(names) + value

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.help or ""
        if action.default in (None, argparse.SUPPRESS, []) or action.nargs == 0 or not action.option_strings:
            return shown
        return super()._get_help_string(action)


def _usage_of(field: dataclasses.Field) -> str:
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    shown = _shown_name(field) + (" ..." if str(field.type).startswith(("list", "tuple")) else "")
    return shown if required else f"[{shown}]"


def _shown_name(field: dataclasses.Field) -> str:
    return field.name.upper()


def _word(value: Any) -> str:
    """A YAML value as the user would type it."""
    return json.dumps(value) if isinstance(value, dict | list | bool) else str(value)
