"""`collm train`: a base and its deferral head, from a YAML file and options on top of it."""

from __future__ import annotations

import json

from collm.training.arguments import TrainArguments as Arguments

HELP = "train a base and its deferral head on scored data; killed, it goes on where it was"
EXAMPLE = """
collm train examples/configs/head_only.yaml --model org/small --data scored --output-dir deferral
collm train examples/configs/paper.yaml --model org/small --data scored --deferral-cost 0.2
accelerate launch --num_processes 8 -m collm.cli train examples/configs/paper.yaml --model org/small --data scored
"""

__all__ = ["EXAMPLE", "HELP", "Arguments", "run"]


def run(arguments: Arguments) -> int:
    """Train; the last line on standard output is a JSON object with the folder and the final numbers."""
    from collm.training.distributed import leave
    from collm.training.train import train

    record = train(arguments)
    if arguments.process_index == 0:
        final = {name: value for name, value in record["results"].items() if name != "log_history"}
        print(json.dumps({"output_dir": arguments.output_dir, **final}, default=str))
    leave()
    return 0
