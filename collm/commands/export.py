"""`collm export`: a deferral checkpoint in another form."""

from __future__ import annotations

from dataclasses import dataclass, field

from collm.errors import ConfigurationError

HELP = "write a deferral checkpoint in another form: full, head only, or as a vocabulary row"
EXAMPLE = """
collm export my-lora-checkpoint full                  # an ordinary checkpoint plus the head
collm export my-checkpoint head --head-only           # a few kilobytes that name their base
collm export my-checkpoint merged --merged            # one more vocabulary row, <|defer|>, for engines without a plugin
"""


@dataclass
class Arguments:
    """What to write, and where."""

    checkpoint: str = field(metadata={"help": "deferral checkpoint: folder or Hub id", "positional": True})
    output: str = field(metadata={"help": "folder to write", "positional": True})
    merged: bool = field(
        default=False,
        metadata={
            "help": "write the head as one more vocabulary row, as in the paper's code; needs a head on hidden alone"
        },
    )
    head_only: bool = field(
        default=False, metadata={"help": "write the head alone: right where the base was not trained"}
    )
    dtype: str = field(default="auto", metadata={"help": "of the weights: auto, float32, bfloat16, float16"})


def run(arguments: Arguments) -> int:
    """Load, convert, save with the tokenizer."""
    from collm import CoLLMForCausalLM
    from collm.checkpoints import check_base_untrained, save_head_only
    from collm.data.tokenizers import load_tokenizer
    from collm.merging import merge_into_vocabulary

    if arguments.merged and arguments.head_only:
        raise ConfigurationError("--merged and --head-only are two forms; choose one.")
    if arguments.head_only:
        check_base_untrained(arguments.checkpoint)
    model = CoLLMForCausalLM.from_pretrained(arguments.checkpoint, dtype=arguments.dtype)
    tokenizer = load_tokenizer(arguments.checkpoint)
    if arguments.head_only:
        save_head_only(model, arguments.output)
    elif arguments.merged:
        token = merge_into_vocabulary(model, tokenizer)
        model.save_pretrained(arguments.output)
        print(f"the deferral logit is the logit of token {token}")
    else:
        model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"written to {arguments.output}")
    return 0
