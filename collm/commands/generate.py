"""`collm generate`: text from a deferral checkpoint and its assistants, each token coloured by who wrote it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from collm.errors import ConfigurationError, DataFormatError, did_you_mean

HELP = "generate text, each token coloured by who wrote it"
EXAMPLE = """
collm generate my-checkpoint --assistant Qwen/Qwen2.5-Coder-1.5B-Instruct --threshold 0.6 "What is 17 * 24?"
collm generate my-checkpoint --assistant org/math-7b --deferral_rate 0.2 --file prompts.txt --format json > out.jsonl
echo "What is 17 * 24?" | collm generate Qwen/Qwen2.5-0.5B-Instruct --assistant Qwen/Qwen2.5-1.5B-Instruct \\
    --router entropy:cut=0.5   # any pair: no trained head needed
"""
FORMATS = ("auto", "color", "plain", "json")
PASSTHROUGH = True  # prompts may follow the options, which argparse does not sort out by itself


@dataclass
class Arguments:
    """Options of `collm generate`."""

    checkpoint: str = field(
        metadata={"positional": True, "help": "deferral checkpoint (or any causal language model): Hub name or folder"}
    )
    prompt: list[str] = field(
        default_factory=list,
        metadata={"positional": True, "help": "prompts; default: those of --file, else of standard input"},
    )
    assistant: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Hub name or folder of an assistant; again for each further one, in the order of the head",
            "action": "extend",
            "one_each": True,
        },
    )
    file: str | None = field(
        default=None, metadata={"help": 'one prompt per line, or JSON lines with "prompt" or "messages"; "-" is stdin'}
    )
    threshold: float | None = field(default=None, metadata={"help": "defer above this deferral probability"})
    deferral_rate: float | None = field(default=None, metadata={"help": "share of tokens to defer, as calibrated"})
    router: str = field(default="learned", metadata={"help": "who is asked: NAME or NAME:PARAMETER=VALUE, or JSON"})
    combiner: str = field(default="assistant", metadata={"help": "what is written once asked, in the same form"})
    max_new_tokens: int = field(default=256, metadata={"help": "new tokens at most"})
    sample: bool = field(default=False, metadata={"help": "sample instead of taking the most likely token"})
    temperature: float = field(default=1.0, metadata={"help": "of sampling"})
    top_p: float = field(default=1.0, metadata={"help": "of sampling"})
    seed: int = field(default=0, metadata={"help": "of sampling and of random routers"})
    system: str | None = field(default=None, metadata={"help": "system prompt"})
    raw: bool = field(default=False, metadata={"help": "continue the prompt itself, without a chat template"})
    batch_size: int = field(default=1, metadata={"help": "prompts that are decoded together"})
    no_speculation: bool = field(default=False, metadata={"help": "ask for every deferred token at once"})
    format: str = field(default="auto", metadata={"help": "auto, color, plain (the text alone) or json (JSON lines)"})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16"})
    device: str | None = field(
        default=None, metadata={"help": "cuda, cpu, ...; default: the first GPU, if there is one"}
    )


def run(arguments: Arguments, remaining: Sequence[str] = ()) -> int:
    """Print each prompt's text, in order, on standard output. `remaining`: prompts behind the options."""
    from tqdm import tqdm

    unknown = next((argument for argument in remaining if argument.startswith("-")), None)
    if unknown is not None:
        hint = did_you_mean(unknown, [f"--{option.name}" for option in fields(Arguments)])
        raise ConfigurationError(f"unknown argument {unknown!r}.{hint} `collm generate --help` shows the options.")
    arguments.prompt = [*arguments.prompt, *remaining]
    if arguments.format not in FORMATS:
        hint = did_you_mean(arguments.format, FORMATS)
        raise ConfigurationError(f'--format is "{arguments.format}"; allowed are {", ".join(FORMATS)}.{hint}')
    _check(arguments)
    chats = read_prompts(arguments)
    if not chats:
        raise DataFormatError("There is no prompt: give one as an argument, by --file, or on standard input.")
    pair = load(arguments)
    starts = range(0, len(chats), arguments.batch_size)
    quiet = len(chats) == 1 or not sys.stderr.isatty()
    for start in tqdm(starts, desc="generating", unit="batch", disable=quiet, file=sys.stderr):
        for record in generate(arguments, *pair, chats[start : start + arguments.batch_size]):
            print(show(arguments, pair[2], record), flush=True)
    return 0


def _check(arguments: Arguments) -> None:
    for name in ("batch_size", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            raise ConfigurationError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(arguments, name)}.")
    if arguments.temperature <= 0:
        raise ConfigurationError("--temperature must be above 0; leave out --sample for the most likely token.")
    if arguments.raw and arguments.system is not None:
        raise ConfigurationError("--raw continues the prompt itself, where there is no place for --system.")
    if not arguments.assistant:
        needing = [
            f"--{field.name.replace('_', '-')}"
            for field in fields(Arguments)
            if field.name in ("threshold", "deferral_rate", "router", "combiner")
            and getattr(arguments, field.name) != field.default
        ]
        if needing:
            raise ConfigurationError(f"{needing[0]} needs an --assistant; without one the base writes alone.")


def read_prompts(arguments: Arguments) -> list[list[dict[str, str]]]:
    """The prompts as chats (lists of messages)."""
    lines = list(arguments.prompt)
    if arguments.file is not None and arguments.file != "-":
        try:
            lines += Path(arguments.file).read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise DataFormatError(f'--file "{arguments.file}" cannot be read: {error.strerror}.') from error
        except UnicodeDecodeError as error:
            raise DataFormatError(f'--file "{arguments.file}" is not UTF-8: {error}.') from error
    elif arguments.file == "-" or not lines:
        lines += sys.stdin.read().split("\n")
    chats = [_chat(line) for line in lines if line.strip()]
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    return [chat if chat[0]["role"] == "system" else [*system, *chat] for chat in chats]


def _chat(line: str) -> list[dict[str, str]]:
    if not line.lstrip().startswith("{"):
        return [{"role": "user", "content": line}]
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return [{"role": "user", "content": line}]
    if "messages" not in row and "prompt" not in row:
        raise DataFormatError(f'A JSON line needs "prompt" or "messages"; this one has {", ".join(row)}: {line[:80]}')
    chat = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    if not isinstance(chat, list) or not chat or not all(_is_message(message) for message in chat):
        raise DataFormatError(
            f'"prompt" must be a text, "messages" a list of {{"role": ..., "content": ...}}, both texts: {line[:80]}'
        )
    return chat


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def load(arguments: Arguments) -> tuple[Any, list[Any], Any]:
    """The deferral model, its assistants, and the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    import collm
    from collm.data.tokenizers import load_tokenizer

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = collm.CoLLMForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=arguments.dtype, num_assistants=len(arguments.assistant) or None
    )
    assistants = []
    for name in arguments.assistant:
        try:
            assistants.append(AutoModelForCausalLM.from_pretrained(name, dtype=arguments.dtype))
        except (OSError, ValueError) as error:
            raise ConfigurationError(f'--assistant "{name}" cannot be loaded: {str(error).splitlines()[0]}') from error
    tokenizer = load_tokenizer(arguments.checkpoint)
    return model.eval().to(device), [m.eval().to(device) for m in assistants], tokenizer


def generate(arguments: Arguments, model: Any, assistants: list[Any], tokenizer: Any, chats: list) -> list[dict]:
    """One record for each chat: prompt, text, token ids, source, deferral probabilities."""
    import torch

    inputs = encode(arguments, tokenizer, chats).to(model.device)
    options: dict[str, Any] = {
        "max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.sample, "return_dict_in_generate": True,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    if arguments.sample:
        options |= {"temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
    if assistants:
        options |= {
            "assistant": assistants, "threshold": arguments.threshold, "deferral_rate": arguments.deferral_rate,
            "router": arguments.router, "combiner": arguments.combiner, "tokenizer": tokenizer,
            "speculate": False if arguments.no_speculation else None,
        }  # fmt: skip
    torch.manual_seed(arguments.seed)
    out = model.generate(**inputs, **options)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    source = out.source if assistants else torch.zeros_like(new)
    probs = out.deferral_probs if assistants else torch.zeros_like(new, dtype=torch.float32)
    records = []
    for row, chat in enumerate(chats):
        length = int((source[row] >= 0).sum())
        ids = new[row, :length].tolist()
        records.append({
            "prompt": chat[-1]["content"], "text": tokenizer.decode(ids, skip_special_tokens=True), "tokens": ids,
            "source": source[row, :length].tolist(),
            "deferral_probs": [round(p, 4) for p in probs[row, :length].tolist()],
            "deferred": round(float((source[row, :length] > 0).float().mean()), 4) if length else 0.0,
        })  # fmt: skip
    return records


def encode(arguments: Arguments, tokenizer: Any, chats: list) -> Any:
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if arguments.raw or not tokenizer.chat_template:
        if any(len(chat) > 1 for chat in chats):
            raise ConfigurationError(
                "a system prompt or an earlier turn needs a chat template"
                + (": leave out --raw." if arguments.raw else f', and "{arguments.checkpoint}" has none.')
            )
        return tokenizer([chat[-1]["content"] for chat in chats], return_tensors="pt", padding=True)
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )


def show(arguments: Arguments, tokenizer: Any, record: dict[str, Any]) -> str:
    """A record as it is printed."""
    from collm.reporting.terminal import color_tokens, wants_color
    from collm.reporting.view import TokenView

    if arguments.format == "json":
        return json.dumps(record, ensure_ascii=False)
    if arguments.format == "plain" or (arguments.format == "auto" and not wants_color()):
        return record["text"]
    names = ["base", *(Path(name).name for name in arguments.assistant)]
    view = TokenView.from_ids(tokenizer, record["tokens"], record["source"], record["deferral_probs"], names=names)
    return color_tokens(view, color=True)
