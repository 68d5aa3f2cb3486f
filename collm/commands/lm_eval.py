"""`collm lm-eval`: lm-evaluation-harness with our model registered."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from collm.errors import ConfigurationError

HELP = "lm-evaluation-harness with the model `collm`; its flags are the harness's own"
EXAMPLE = """
collm lm-eval --model_args pretrained=my-checkpoint,assistant=org/big,threshold=0.6 --tasks gsm8k --batch_size 8
collm lm-eval --model_args pretrained=my-checkpoint,assistant=org/math;org/law,deferral_rate=0.2 --tasks bbh,tydiqa
collm lm-eval ls tasks                                              # whatever else the harness's command line has
"""
PASSTHROUGH = True


@dataclass
class Arguments:
    """None of our own: everything goes to the harness (a configuration file of the harness as `-C FILE`)."""


def run(arguments: Arguments, remaining: list[str]) -> int:
    """Hands the flags over; `--model collm` is added where no model is named."""
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging
    except ImportError as error:
        raise ConfigurationError(
            f"lm-evaluation-harness is not installed ({error}): pip install 'collm[eval]'"
        ) from error
    import collm.evaluation.harness  # noqa: F401  registers the model

    commands = ("run", "ls", "validate")
    flags = remaining if remaining[:1] and remaining[0] in commands else ["run", *remaining]
    named = any(flag.split("=")[0] in ("--model", "-M") for flag in flags)
    if flags[0] == "run" and not named:
        flags[1:1] = ["--model", "collm"]
    setup_logging()
    before, sys.argv = sys.argv, ["collm lm-eval", *flags]  # the harness reads the process's own arguments
    try:
        cli = HarnessCLI()
        cli.execute(cli.parse_args())
    finally:
        sys.argv = before
    return 0
