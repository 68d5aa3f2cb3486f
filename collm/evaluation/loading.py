"""A deferral checkpoint and its assistants: loaded, checked for one tokenizer, and ready to write."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from collm.data.tokenizers import check_same_tokenizer, load_tokenizer
from collm.errors import AssistantError, ConfigurationError
from collm.evaluation.generations import weights_fingerprint
from collm.evaluation.runner import ModelWriter, Writer
from collm.fingerprints import files_fingerprint

# Engine arguments that say where a model runs, or how much of it at once: texts may go on under others.
PLACEMENT = (
    "device",
    "gpu_memory_utilization",
    "max_num_batched_tokens",
    "max_num_seqs",
    "name",
    "tensor_parallel_size",
)
# Names as `collm serve` has them.
ENGINES: dict[str, Literal["vllm", "transformers"]] = {"vllm": "vllm", "sessions": "transformers"}


class Models(NamedTuple):
    """`model` the base with its head, `assistants` a list, and the base's `tokenizer`; `names` of all for reports."""

    model: Any
    assistants: list[Any]
    tokenizer: Any
    names: list[str]


@dataclass
class Team:
    """
    Everything that writes in an evaluation, whatever it runs on.

    Args:
        model ([`CoLLMForCausalLM`]): the base with its head, in transformers: for scores along texts.
        tokenizer (`PreTrainedTokenizerBase`): the base's.
        names (`list[str]`): of base and assistants, for reports.
        writer (a writer with `options`): base and assistants together; `dataclasses.replace` gives it other options.
        alone (`list[Writer]`): base and each assistant by themselves.
        parameters (`list[int]`): parameters of base and assistants.
        identity (`dict`): what its texts depend on, for [`GenerationStore`].
        closes (`list`): writers whose engines or connections end with the team.
    """

    model: Any
    tokenizer: Any
    names: list[str]
    writer: Any
    alone: list[Writer]
    parameters: list[int]
    identity: dict[str, Any] = field(default_factory=dict)
    closes: list[Any] = field(default_factory=list)

    def close(self) -> None:
        """Ends engines that were started for it."""
        for writer in self.closes:
            writer.close()


def load_team(
    checkpoint: str,
    assistants: Sequence[str],
    dtype: str = "auto",
    device: str | None = None,
    engine: str = "transformers",
    engine_args: str = "{}",
    assistant_engine_args: str = "{}",
    max_new_tokens: int = 512,
    seed: int = 0,
    at_once: int = 1,
) -> Team:
    """
    Loads base and assistants for `engine`.

    Args:
        checkpoint, assistants, dtype, device: as for [`load_models`].
        engine (`str`, *optional*, defaults to `"transformers"`): "transformers" (`generate`), "vllm", or "sessions"
            (the serving engine over transformers).
        engine_args, assistant_engine_args (`str`, *optional*): JSON for the engines, as in `collm serve`.
        max_new_tokens, seed: of the writers.
        at_once (`int`, *optional*): how many answers an engine has to have room for; those of `collm serve` at least.

    Raises:
        As [`load_models`], and whatever `collm serve` raises for its engines.
    """
    if engine == "transformers":
        models = load_models(checkpoint, assistants, dtype, device)
        everyone = [models.model, *models.assistants]
        return Team(
            models.model,
            models.tokenizer,
            models.names,
            ModelWriter(models.model, models.tokenizer, models.assistants, {}, max_new_tokens, seed),
            [ModelWriter(model, models.tokenizer, (), {}, max_new_tokens, seed) for model in everyone],
            [num_parameters(model) for model in everyone],
            {"weights": [weights_fingerprint(model) for model in everyone], "dtype": str(models.model.dtype)},
        )

    from collm.commands import serve
    from collm.evaluation.engines import EngineWriter, LateEngines

    model = load_base(checkpoint, dtype, device)
    arguments = serve.Arguments(
        checkpoint,
        [name for name in assistants if name] or list(model.config.deferral.assistants),
        serve.choose_engine(ENGINES[engine]),
        dtype=dtype,
        engine_args=engine_args,
        assistant_engine_args=assistant_engine_args,
        max_running=max(at_once, serve.Arguments.max_running),
    )
    deferral, names, tokenizer = serve.read_checkpoint(arguments)
    engines = LateEngines(lambda: serve.start_engines(arguments, names, tokenizer))
    helpers = [engines[k] for k in range(1, len(names) + 1)]
    common: dict[str, Any] = {
        "tokenizer": tokenizer,
        "eos_ids": serve.end_of_sequence(tokenizer, checkpoint, deferral.base_model),
        "deferral": model.config.deferral,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    writer = EngineWriter(engines[0], helpers, **common)
    alone = [EngineWriter(engines[0], (), **common, loop=writer.loop)]
    for helper, name in zip(helpers, names, strict=True):  # each ends its text as it learned to
        own = {**common, "eos_ids": serve.end_of_sequence(tokenizer, name)}
        alone.append(EngineWriter(helper, (), **own, loop=writer.loop))
    unloaded = [described(name) for name in names]
    identity = {
        "weights": [weights_fingerprint(model), *(fingerprint for fingerprint, _ in unloaded)],
        "dtype": dtype,
        "engine": engine,
        "engine_args": _that_matters(serve.engine_options(engine_args)),
        "assistant_engine_args": _that_matters(serve.engine_options(assistant_engine_args)),
    }
    return Team(
        model,
        tokenizer,
        [short_name(name) for name in (checkpoint, *names)],
        writer,
        [*alone],
        [num_parameters(model), *(parameters for _, parameters in unloaded)],
        identity,
        [writer],
    )


def load_single(
    team: Team,
    name: str,
    dtype: str = "auto",
    device: str | None = None,
    engine: str = "transformers",
    engine_args: str = "{}",
    at_once: int = 1,
) -> Team:
    """
    `team` with a plain model in place of the base, such as a fine-tuned one: its `writer` writes by itself.

    Args:
        team ([`Team`]): whose tokenizer, limits and seed it gets.
        name (`str`): folder or Hub name of the model.
        dtype, device, engine, engine_args, at_once: as for [`load_team`].

    Raises:
        [`AssistantError`]: it cannot be loaded.
    """
    names = [short_name(name)]
    if engine == "transformers":
        model = load_plain(name, dtype, device)
        identity: dict[str, Any] = {"weights": [weights_fingerprint(model)], "dtype": str(model.dtype)}
        writer = replace(team.writer, model=model, assistants=())
        return Team(model, team.tokenizer, names, writer, [writer], [num_parameters(model)], identity)

    from collm.commands import serve
    from collm.evaluation.engines import LateEngines

    fingerprint, parameters = described(name)
    room = max(at_once, serve.Arguments.max_running)
    arguments = serve.Arguments(name, dtype=dtype, engine_args=engine_args, max_running=room)
    options = serve.engine_options(engine_args)
    engines = LateEngines(
        lambda: (serve.start_engine(ENGINES[engine], arguments, name, options, serve.Place(None, 1)), [])
    )
    eos_ids = serve.end_of_sequence(team.tokenizer, name)
    writer = replace(team.writer, base=engines[0], assistants=(), eos_ids=eos_ids, loop=asyncio.Runner())
    identity = {"weights": [fingerprint], "dtype": dtype, "engine": engine, "engine_args": _that_matters(options)}
    return Team(None, team.tokenizer, names, writer, [writer], [parameters], identity, [writer])


def load_models(
    checkpoint: str, assistants: Sequence[str] = (), dtype: str = "auto", device: str | None = None
) -> Models:
    """
    Loads a deferral checkpoint and its assistants in transformers, ready to generate.

    Args:
        checkpoint (`str`): folder or Hub name; a plain causal language model gets a new head.
        assistants (sequence of `str`): folders or Hub names; by default those that the checkpoint names.
        dtype (`str`, *optional*, defaults to `"auto"`): "auto" (as saved), "float32", "bfloat16" or "float16".
        device (`str`, *optional*): by default a GPU where there is one.

    Raises:
        [`CheckpointError`], [`AssistantError`], [`TokenizerMismatchError`]: a model cannot be loaded, or they do not
        share a vocabulary.
        [`ConfigurationError`]: the number of assistants is not the head's.
    """
    model = load_base(checkpoint, dtype, device)
    names = [name for name in assistants if name] or list(model.config.deferral.assistants)
    count = model.config.deferral.num_assistants
    if len(names) != count:
        known = "" if names else ", and it does not say which"
        raise ConfigurationError(
            f'"{checkpoint}" has a head for {count} assistant{"s" * (count > 1)}{known}; {len(names)} given. Name '
            "each with --assistant."
        )
    tokenizer = load_tokenizer(checkpoint)
    for name in names:
        check_same_tokenizer(tokenizer, name, base_name=checkpoint)
    loaded = [load_plain(name, dtype, device) for name in names]
    return Models(model, loaded, tokenizer, [short_name(name) for name in (checkpoint, *names)])


def load_base(checkpoint: str, dtype: str = "auto", device: str | None = None) -> Any:
    """The base of a checkpoint of any kind (full, head-only, LoRA) with its head, ready to generate."""
    from collm import CoLLMForCausalLM

    return CoLLMForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device or _default_device()).eval()


def load_plain(name: str, dtype: str = "auto", device: str | None = None) -> Any:
    """A causal language model of transformers, ready to generate.

    Raises:
        [`AssistantError`]: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device or _default_device()).eval()
    except (OSError, ValueError) as error:
        raise AssistantError(f'the model "{name}" cannot be loaded: {error}') from error


def short_name(name: str) -> str:
    """The last part of a path or Hub name, as reports show it."""
    return Path(name).name or name


def _that_matters(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in PLACEMENT}


def num_parameters(model: Any) -> int:
    """Parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def described(name: str) -> tuple[str, int]:
    """Fingerprint and number of parameters of a model that is not loaded here.

    Raises:
        [`AssistantError`]: it has no config of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            return files_fingerprint(name, config), num_parameters(AutoModelForCausalLM.from_config(config))
    except (OSError, ValueError) as error:
        raise AssistantError(f'the model "{name}" cannot be loaded: {error}') from error


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
