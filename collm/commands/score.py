"""`collm score`: the assistants' log-probabilities of a data set's targets, ahead of training."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields

from collm.data.scoring import AssistantSettings, score_dataset
from collm.errors import ConfigurationError

HELP = "write what the assistants say about a data set, token by token; killed, it goes on where it was"
EXAMPLE = """
collm score gsm8k/train.jsonl --task gsm8k --model Qwen/Qwen2.5-Coder-0.5B-Instruct \\
    --assistant Qwen/Qwen2.5-Coder-1.5B-Instruct --output scored
collm score chats.jsonl --assistant org/math-7b --assistant org/law-7b --quantization 4bit --output scored
accelerate launch -m collm.cli score allenai/tulu-3-sft-mixture --assistant org/big --output scored   # several devices
"""


@dataclass
class Arguments:
    """Options of `collm score`; the scored data set is read by `collm train`."""

    dataset: str = field(
        metadata={"positional": True, "help": "JSON lines, JSON or parquet file, folder, or name on the Hub"}
    )
    assistant: list[str] = field(
        metadata={"help": "Hub name or folder of an assistant; again for each further one", "action": "extend"}
    )
    output: str = field(metadata={"help": "folder for the scored data set"})
    model: str | None = field(
        default=None,
        metadata={"help": "the base, whose tokenizer and chat template format the rows; default: the first assistant"},
    )
    task: str | None = field(
        default=None, metadata={"help": "ready-made format: gsm8k, math, tulu, bioasq or bioasq_snippets"}
    )
    split: str = field(default="train", metadata={"help": 'split to read; "train[:1000]" takes the first 1000 rows'})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a data set on the Hub"})
    max_length: int | None = field(default=None, metadata={"help": "cut sequences at this many tokens"})
    chat_template: str | None = field(
        default=None, metadata={"help": 'instead of the tokenizer\'s: "tulu" or a Jinja file'}
    )
    assistant_chat_template: list[str] = field(
        default_factory=list,
        metadata={"help": 'for each assistant, its own chat template: "shared", "own", "tulu" or a Jinja file'},
    )
    assistant_system_prompt: list[str] = field(
        default_factory=list, metadata={"help": "for each assistant, a system prompt of its own; empty for none"}
    )
    batch_tokens: int = field(default=4096, metadata={"help": "tokens per batch, padding included"})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16"})
    quantization: str | None = field(default=None, metadata={"help": "4bit or 8bit, by bitsandbytes"})
    attn_implementation: str | None = field(default=None, metadata={"help": "as in transformers, flash_attention_2"})
    device_map: str | None = field(default=None, metadata={"help": '"auto" spreads one assistant over all devices'})
    engine: str = field(default="transformers", metadata={"help": "transformers, or vllm for big assistants"})
    tensor_parallel_size: int = field(default=1, metadata={"help": "devices that vLLM splits an assistant over"})


def run(arguments: Arguments) -> int:
    """Format, check, score; the last line on standard output is the folder that was written."""
    from collm.data.chat import Chat
    from collm.data.formatting import format_rows
    from collm.data.reading import read_rows
    from collm.data.tokenizers import check_same_tokenizer, load_tokenizer

    options = {f.name: getattr(arguments, f.name) for f in fields(AssistantSettings) if f.name != "name"}
    settings = [AssistantSettings(name, **options) for name in arguments.assistant]
    model = arguments.model or arguments.assistant[0]
    tokenizer = load_tokenizer(model)
    for name in arguments.assistant:
        check_same_tokenizer(tokenizer, name, base_name=model)

    templates = _per_assistant("assistant_chat_template", arguments.assistant_chat_template, settings, "shared")
    prompts = _per_assistant("assistant_system_prompt", arguments.assistant_system_prompt, settings, "")
    chats = []
    for name, template, prompt in zip(arguments.assistant, templates, prompts, strict=True):
        if template == "shared":
            chats.append(Chat(tokenizer, arguments.chat_template, prompt) if prompt else None)
        else:
            chats.append(Chat(load_tokenizer(name), None if template == "own" else template, prompt or None))

    rows = read_rows(arguments.dataset, arguments.split, arguments.dataset_config)
    dataset, report = format_rows(
        rows, tokenizer, arguments.task, arguments.max_length, arguments.chat_template, assistant_chats=chats
    )
    print(report, file=sys.stderr)
    score_dataset(dataset, tokenizer, settings, arguments.output, arguments.batch_tokens, report)
    print(arguments.output)
    return 0


def _per_assistant(option: str, values: list[str], assistants: list[AssistantSettings], default: str) -> list[str]:
    values = values or [default] * len(assistants)
    if len(values) != len(assistants):
        raise ConfigurationError(
            f"{option} has {len(values)} values for {len(assistants)} assistants; give one for each."
        )
    return values
