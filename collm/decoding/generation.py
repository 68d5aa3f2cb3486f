"""`generate(assistant=...)`: what `CoLLMForCausalLM` adds to transformers' `generate`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
)
from transformers.generation import (
    BaseStreamer,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EosTokenCriteria,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    StopStringCriteria,
)
from transformers.utils import ModelOutput, cached_file

from collm.errors import (
    ConfigurationError,
    TokenizerMismatchError,
    UnsupportedModelError,
    did_you_mean,
)

from .cache import architecture_of, can_roll_back, reader_for
from .combiners import ResolvedCombiner, resolve_combiner
from .loop import Choice, Decoder, Ending, decode
from .registry import Spec
from .routers import Router, learned, resolve_router, threshold_of_rate, uses_randomness, uses_threshold
from .speculation import DraftGate, step_cost

ON_ASSISTANT_ERROR = ("raise", "base")
# Processors of transformers that count the rows of a batch, or keep its prompts.
WHOLE_BATCH = (
    PrefixConstrainedLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
)
# Embeddings are padded to round numbers, so sizes differ within a family; by more than this they mean other tokens.
PADDING_SHARE = 0.02

# Options of transformers' generate that collaborative decoding does not have, and what to do instead.
UNSUPPORTED = {
    "num_beams": "beam search is not available: use greedy search or sampling (num_beams=1), or compose beam search "
    "with CollaborativeLogitsProcessor",
    "penalty_alpha": "contrastive search is not available: combiner='contrastive' contrasts the two models",
    "dola_layers": "DoLa is not available: leave dola_layers out",
    "prompt_lookup_num_tokens": "prompt lookup is not available: speculate=True drafts with the base instead",
    "guidance_scale": "classifier-free guidance runs the model itself: compose it with CollaborativeLogitsProcessor",
    "constraints": "constrained beam search is not available: use prefix_allowed_tokens_fn",
    "force_words_ids": "constrained beam search is not available: use prefix_allowed_tokens_fn",
    "output_attentions": "attentions of two models are not collected: run the finished text through each model",
    "output_hidden_states": "hidden states of two models are not collected: run the finished text through each model",
    "cache_implementation": "the caches are the loop's own, since they must roll back: leave cache_implementation out",
}
NOT_FOR_COLLABORATION = {
    "past_key_values": "pass the whole conversation as input_ids; each model reads it once",
    "inputs_embeds": "assistants read tokens: pass input_ids",
    "use_cache": "both models keep their caches: leave use_cache out",
    "custom_generate": "assistant= brings its own loop: pass one of the two",
    "synced_gpus": "models sharded by ZeRO-3 or FSDP cannot generate with an assistant: gather them first",
    "negative_prompt_ids": "classifier-free guidance is not available with an assistant",
}


@dataclass
class CollaborativeOutput(ModelOutput):
    """What `generate(assistant=..., return_dict_in_generate=True)` returns.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, prompt + new tokens)`): prompts and new tokens, padded behind.
        source (`torch.LongTensor` of shape `(batch, new tokens)`): who wrote it: 0 the base, k assistant k, -1 padding.
        deferral_probs (`torch.FloatTensor` of shape `(batch, new tokens)`): d_t of the head; 0 at padding.
        stats (`dict`): what it took. `base_calls`, `base_tokens`, `base_padding`, `base_discarded`: forwards of the
            base, tokens that it read, padding read along, tokens rolled back; `assistant_*` the same as lists, one
            entry for each assistant (then for the combiner's further models). `new_tokens`, `deferrals` (by
            assistant), `drafted` and `accepted` (deferred tokens that a stand-in was drafted for, and that it was
            right for), `guesses` and `guesses_right` (tokens that the base read along because they were likely to
            follow), `fallback` (for each row the new token from which on it had to do without an assistant, or `None`),
            `seconds`.
        scores, logits (`tuple[torch.FloatTensor]`, *optional*): with `output_scores` / `output_logits`, one
            `(batch, vocabulary)` per new token, after and before logits processors, of whoever wrote; 0 at padding.
    """

    sequences: Tensor | None = None
    source: Tensor | None = None
    deferral_probs: Tensor | None = None
    stats: dict[str, Any] | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None


class SourceStreamer(BaseStreamer):
    """A streamer that is also told who wrote each token. Subclass it and implement `put` and `end`."""

    def put(self, value: Tensor, source: Tensor | None = None) -> None:
        """`value`: prompt tokens `(batch, prompt)` first, then `(batch,)` new tokens with their `source` `(batch,)`."""
        raise NotImplementedError

    def end(self) -> None:
        raise NotImplementedError


@dataclass
class Collaboration:
    """The options of one call, checked."""

    assistants: list[PreTrainedModel]
    threshold: float | list[float]
    router: Router
    combiner: ResolvedCombiner
    speculate: bool
    inputs: list[Mapping[str, Tensor] | None]
    fall_back: bool
    streamer: BaseStreamer | None


class CollaborativeGenerationMixin:
    """Holds `generate`. Meant to stand before a model class of transformers, whose `generate` it extends."""

    config: Any

    def generate(
        self,
        *args: Any,
        assistant: PreTrainedModel | Sequence[PreTrainedModel] | None = None,
        threshold: float | Sequence[float] | None = None,
        deferral_rate: float | Sequence[float] | None = None,
        router: Spec | None = None,
        combiner: Spec | None = None,
        speculate: bool | None = None,
        assistant_inputs: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor] | None] | None = None,
        on_assistant_error: str = "raise",
        **kwargs: Any,
    ) -> Any:
        r"""Generate text, token by token from the base or an assistant. Without `assistant`, the base's `generate`.

        Everything else is as in transformers: `max_new_tokens`, `do_sample` and its warpers, `eos_token_id`,
        `stop_strings` (with `tokenizer`), `stopping_criteria`, `logits_processor`, `num_return_sequences`, `max_time`,
        `streamer`, `output_scores`, `output_logits`, `return_dict_in_generate`. Processors apply to the distribution of
        whoever writes. Beam search and caches of your own are not available.

        Args:
            assistant (`PreTrainedModel` or a list of K of them): in the order of the head's rows
                (`config.deferral.assistants`). Any device, dtype or quantisation; the base's tokenizer.
            threshold (`float` or a sequence of them, one for each prompt, *optional*): eta; the assistant writes where
                d_t > eta. 1 never asks, a negative one always. Default `config.deferral.threshold`.
            deferral_rate (`float` or a sequence, *optional*): share of tokens to defer, turned into a threshold by the
                checkpoint's calibration table. Not together with `threshold`, and for the learned router alone.
            router (`str`, `dict` or `Callable`, *optional*, defaults to `"learned"`): who is asked; see
                [`~collm.decoding.routers`].
            combiner (`str`, `dict` or `Callable`, *optional*, defaults to `"assistant"`): what is written once an
                assistant is asked; see [`~collm.decoding.combiners`].
            speculate (`bool`, *optional*): let the base draft past tokens that it would defer, and verify several in
                one pass of the assistant. The same tokens, usually sooner. Default: wherever both caches can be rolled
                back.
            assistant_inputs (`dict` with `input_ids` and `attention_mask`, or a list of K of them, *optional*):
                prompts of the assistants' own, with another chat template or retrieved documents, say. New tokens are
                shared.
            on_assistant_error (`"raise"` or `"base"`): what to do when an assistant raises, runs out of memory, or out
                of positions. With `"base"` the tokens so far stand and the base goes on alone; see `stats["fallback"]`.

        Returns:
            `torch.LongTensor` of shape `(batch, prompt + new tokens)`, or [`CollaborativeOutput`].

        Raises:
            ConfigurationError: options that contradict each other or transformers options that have no counterpart.
            UnsupportedModelError: an encoder-decoder as assistant, or the wrong number of assistants.
            TokenizerMismatchError: base and assistant have different vocabularies.
            CalibrationError: `deferral_rate` without a calibration table that covers it, or with another router.
            AssistantError: an assistant failed, under `on_assistant_error="raise"`.

        Example:

        ```python
        >>> out = model.generate(**inputs, assistant=big, threshold=0.6, return_dict_in_generate=True)
        >>> out.source[0]
        tensor([0, 0, 1, 0, 0, ...])
        ```
        """
        ours = {"threshold": threshold, "deferral_rate": deferral_rate, "router": router, "combiner": combiner,
                "speculate": speculate, "assistant_inputs": assistant_inputs}  # fmt: skip
        if assistant is None:
            _check_alone([name for name, value in ours.items() if value is not None], kwargs)
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        for name, instead in NOT_FOR_COLLABORATION.items():
            if kwargs.get(name) is not None:
                raise ConfigurationError(f"{name}= cannot be combined with assistant=: {instead}.")
        if kwargs.get("assistant_model") is not None:
            raise ConfigurationError(
                "assistant_model= is transformers' speculative decoding, where a small model drafts for this one. Here "
                "the base defers tokens to assistant=, and drafts by itself (speculate=True). Pass assistant= alone."
            )
        if on_assistant_error not in ON_ASSISTANT_ERROR:
            raise ConfigurationError(
                f'on_assistant_error is "{on_assistant_error}"; allowed are {", ".join(ON_ASSISTANT_ERROR)}.'
                f"{did_you_mean(on_assistant_error, ON_ASSISTANT_ERROR)}"
            )
        tokenizer = kwargs.pop("tokenizer", None)
        assistants = check_assistants(self, assistant, tokenizer)
        resolved, combined = resolve_router(router), resolve_combiner(combiner)
        for model in combined.models.values():
            check_assistant(self, model, "the combiner's model", tokenizer)
        collaboration = Collaboration(
            assistants=assistants,
            threshold=resolve_threshold(self, threshold, deferral_rate, resolved),
            router=resolved,
            combiner=combined,
            speculate=resolve_speculation(self, [*assistants, *combined.models.values()], speculate),
            inputs=_inputs_by_assistant(assistant_inputs, len(assistants)),
            fall_back=on_assistant_error == "base",
            streamer=kwargs.get("streamer"),
        )
        args, kwargs = _own_stop_strings(self, args, kwargs, tokenizer)
        loop = functools.partial(collaborate, collaboration=collaboration)
        return super().generate(*args, custom_generate=loop, **kwargs)  # type: ignore[misc]


@torch.no_grad()
def collaborate(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    collaboration: Collaboration,
    **model_kwargs: Any,
) -> CollaborativeOutput | Tensor:
    """What transformers' `generate` calls once inputs, processors and criteria are prepared (`custom_generate`)."""
    _check_generation_config(generation_config, model_kwargs)
    prompts = _token_lists(input_ids, model_kwargs.get("attention_mask"))
    models = [model, *collaboration.assistants, *collaboration.combiner.models.values()]
    copies = generation_config.num_return_sequences or 1
    own = [None if own is None else _own_prompts(own, len(prompts), copies) for own in collaboration.inputs]
    by_reader = [
        prompts,
        *(prompts if p is None else p for p in own),
        *(prompts for _ in collaboration.combiner.models),
    ]
    # The user's criterion stands in the place of the config's. As in transformers, one token is always written.
    max_length = min(c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria)
    max_steps = max(max_length - input_ids.shape[1], 1)
    eos = [c.eos_token_id.tolist() for c in stopping_criteria if type(c) is EosTokenCriteria]
    pad = generation_config._pad_token_tensor
    known = (EosTokenCriteria, MaxLengthCriteria)
    random = generation_config.do_sample or uses_randomness(collaboration.router)
    decoder = Decoder(
        [reader_for(m, max(map(len, p)) + max_steps) for m, p in zip(models, by_reader, strict=True)],
        by_reader,
        input_ids,
        num_assistants=len(collaboration.assistants),
        router=collaboration.router,
        combiner=collaboration.combiner,
        threshold=_by_row(collaboration.threshold, len(prompts), copies),
        choice=Choice(
            sample=bool(generation_config.do_sample),
            seed=int(torch.randint(2**62, ())) if random else 0,
            processors=logits_processor,
            whole_batch=len(input_ids) > 1 and not all(_is_row_wise(p) for p in logits_processor),
        ),
        ending=Ending(
            max_steps=max_steps,
            eos=frozenset(token for tokens in eos for token in tokens),
            pad=int(pad) if pad is not None else 0,
            criteria=StoppingCriteriaList(c for c in stopping_criteria if type(c) not in known),
        ),
        gate=DraftGate(step_cost(models[1]) / step_cost(model)) if collaboration.speculate else None,
        streamer=_streaming(collaboration.streamer),
        keep_scores=bool(generation_config.output_scores or generation_config.output_logits),
        fall_back=collaboration.fall_back,
    )
    stats = decode(decoder)
    if collaboration.streamer is not None:
        collaboration.streamer.end()
    return _output(decoder, input_ids, generation_config, stats)


def _output(decoder: Decoder, input_ids: Tensor, config: GenerationConfig, stats: dict[str, Any]) -> Any:
    rows, device = decoder.rows, input_ids.device
    width = max(len(row.tokens) for row in rows)

    def rectangle(values: list[list[Any]], fill: Any) -> Tensor:
        return torch.tensor([v[:width] + [fill] * (width - len(v)) for v in values], device=device)

    tokens = rectangle([row.tokens for row in rows], decoder.ending.pad)
    sequences = torch.cat([input_ids, tokens.to(input_ids.dtype)], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    probs = [row.deferral_probs[: len(row.tokens)] for row in rows]
    return CollaborativeOutput(
        sequences=sequences,
        source=rectangle([row.source for row in rows], -1),
        deferral_probs=rectangle(probs, 0.0),
        stats=stats,
        scores=_columns([row.processed for row in rows], width) if config.output_scores else None,
        logits=_columns([row.raw for row in rows], width) if config.output_logits else None,
    )


def _columns(by_row: list[dict[int, Tensor]], width: int) -> tuple[Tensor, ...]:
    """One `(batch, vocabulary)` for each new token; 0 for rows that are finished."""
    blank = torch.zeros_like(next(iter(by_row[0].values())))
    return tuple(torch.stack([scores.get(step, blank) for scores in by_row]) for step in range(width))


# -- checks ------------------------------------------------------------------------------------------------------------


def check_assistants(
    base: Any, assistant: PreTrainedModel | Sequence[PreTrainedModel], tokenizer: Any = None
) -> list[PreTrainedModel]:
    """The assistants as a list, after everything that can be known before any work.

    Raises:
        [`UnsupportedModelError`], [`TokenizerMismatchError`], [`ConfigurationError`].
    """
    assistants = list(assistant) if isinstance(assistant, (list, tuple)) else [assistant]
    deferral = base.config.deferral
    if len(assistants) != deferral.num_assistants:
        names = f" ({', '.join(deferral.assistants)})" if deferral.assistants else ""
        raise ConfigurationError(
            f"This checkpoint's head chooses between {deferral.num_assistants} assistant(s){names}, but "
            f"{len(assistants)} were passed as assistant=. Pass one model for each row of the head, in that order."
        )
    for k, model in enumerate(assistants, start=1):
        check_assistant(base, model, f"assistant {k}" if len(assistants) > 1 else "the assistant", tokenizer)
    return assistants


def check_assistant(base: Any, model: Any, name: str, tokenizer: Any = None) -> None:
    if isinstance(model, str):
        raise ConfigurationError(
            f'{name} is the string "{model}": load it first, AutoModelForCausalLM.from_pretrained("{model}").'
        )
    config = architecture_of(model).config
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} ({type(model).__name__}) is an encoder-decoder: it cannot continue the base's text. Take a "
            "causal language model."
        )
    ours, theirs = (c.get_text_config().vocab_size for c in (base.config, config))
    if abs(ours - theirs) > PADDING_SHARE * max(ours, theirs):
        raise TokenizerMismatchError(
            f"the base has a vocabulary of {ours} tokens and {name} one of {theirs}: these are different tokenizers, "
            "and deferral exchanges token ids. Choose an assistant of the base's family."
        )
    theirs_at, ours_at = config.name_or_path, tokenizer
    if tokenizer is None:  # a checkpoint of the head alone has none of its own
        names = (base.config.name_or_path, base.config.deferral.base_model)
        ours_at = next((name for name in names if name == theirs_at or _vocabulary_file(name)), None)
    if ours_at is not None and ours_at != theirs_at and _vocabulary_file(theirs_at):
        _check_same_tokenizer(ours_at, theirs_at)


@functools.lru_cache(maxsize=32)
def _check_same_tokenizer(base: Any, assistant: str) -> None:
    from collm.data.tokenizers import check_same_tokenizer

    ours, theirs = (
        PreTrainedTokenizerFast(tokenizer_file=_vocabulary_file(name)) if isinstance(name, str) else name
        for name in (base, assistant)
    )
    check_same_tokenizer(ours, theirs, base if isinstance(base, str) else "the base", assistant)


def _vocabulary_file(name: str | None) -> str | None:
    """The tokenizer.json of a folder, or of a Hub name if it was downloaded before: `generate` needs no network."""
    try:
        return cached_file(name, "tokenizer.json", local_files_only=True) if name else None
    except OSError:
        return None


def resolve_threshold(
    model: Any,
    threshold: float | Sequence[float] | None,
    deferral_rate: float | Sequence[float] | None,
    router: Router = learned,
) -> float | list[float]:
    """eta: an explicit threshold, else the calibrated one of a deferral rate, else the checkpoint's; a list where one
    was given for each prompt.

    Raises:
        [`ConfigurationError`]: both are given. [`CalibrationError`]: the table does not answer `deferral_rate`, or not
            for this router.
    """
    if threshold is not None and deferral_rate is not None:
        raise ConfigurationError(
            f"threshold={threshold} and deferral_rate={deferral_rate} say two things: a deferral rate is turned into a "
            "threshold by the calibration table. Pass one of them."
        )
    if threshold is not None:
        if not uses_threshold(router):
            warnings.warn("threshold= has no effect: this router has a cut or a rate of its own.", stacklevel=3)
        return _each(float, threshold)
    if deferral_rate is not None:
        return _each(lambda rate: threshold_of_rate(model.config.deferral, rate, router), deferral_rate)
    return model.config.deferral.threshold


def _each(function: Callable[[float], float], value: float | Sequence[float]) -> float | list[float]:
    values = torch.as_tensor(value, dtype=torch.float64).tolist()
    return [function(v) for v in values] if isinstance(values, list) else function(values)


def _by_row(threshold: float | list[float], rows: int, copies: int) -> float | list[float]:
    """One threshold for each row; a prompt's copies (`num_return_sequences`) share its own."""
    if not isinstance(threshold, list):
        return threshold
    if len(threshold) * copies != rows:
        raise ConfigurationError(
            f"{len(threshold)} thresholds or deferral rates for {rows // copies} prompts: pass one each, or a number."
        )
    return [eta for eta in threshold for _ in range(copies)]


def resolve_speculation(base: Any, others: list[Any], speculate: bool | None) -> bool:
    """Whether to speculate: wherever all caches can be rolled back, unless the user says no."""
    stuck = [type(architecture_of(m)).__name__ for m in (base, *others) if not can_roll_back(m)]
    if speculate and stuck:
        warnings.warn(
            f"{stuck[0]} has a recurrent cache, which cannot be rolled back: speculate=True is ignored and the plain "
            "loop reads one row at a time.",
            stacklevel=3,
        )
    return not stuck and (speculate is None or speculate)


def _check_alone(ours: list[str], kwargs: dict[str, Any]) -> None:
    if ours:
        raise ConfigurationError(f"{ours[0]}= needs an assistant: pass assistant=MODEL too, or leave {ours[0]}= out.")
    if kwargs.get("assistant_model") is not None:
        warnings.warn(
            "assistant_model= is transformers' speculative decoding: the base's own text, drafted by another model. To "
            "let another model write tokens, pass assistant=.",
            stacklevel=3,
        )


def _check_generation_config(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    for name, instead in UNSUPPORTED.items():
        value = model_kwargs.get(name, getattr(config, name, None))
        if value is True or value not in (None, False, 1):
            raise ConfigurationError(f"{name}={value} with an assistant: {instead}.")
    watermark = getattr(config, "watermarking_config", None)
    if watermark is not None and "SynthID" in type(watermark).__name__:
        raise ConfigurationError(
            "SynthID watermarking keeps a state per step and cannot be rolled back: use WatermarkingConfig instead."
        )
    handled = {"attention_mask", "position_ids", "past_key_values", "cache_params", "use_cache", "logits_to_keep"}
    other = [name for name, value in model_kwargs.items() if name not in handled and value is not None]
    if other:
        raise UnsupportedModelError(
            f"{', '.join(other)} cannot be passed with an assistant: both models read tokens and nothing else."
        )


def _own_stop_strings(model: Any, args: tuple, kwargs: dict[str, Any], tokenizer: Any) -> tuple[tuple, dict[str, Any]]:
    """Turn `stop_strings` into a criterion: transformers hands no tokenizer on to a `custom_generate` callable."""
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    places = [kwargs.get("stop_strings"), getattr(config, "stop_strings", None), model.generation_config.stop_strings]
    strings = next((place for place in places if place is not None), None)
    if strings is None:
        return args, kwargs
    if tokenizer is None:
        raise ConfigurationError("stop_strings need the tokenizer: pass tokenizer= to generate, as in transformers.")
    kwargs = {**kwargs, "stop_strings": None}
    criterion = StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)
    if len(args) > 3:
        args = (*args[:3], StoppingCriteriaList([*(args[3] or []), criterion]), *args[4:])
    else:
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), criterion])
    return args, kwargs


# -- inputs ------------------------------------------------------------------------------------------------------------


def _inputs_by_assistant(inputs: Any, number: int) -> list[Mapping[str, Tensor] | None]:
    if inputs is None or isinstance(inputs, Mapping):
        inputs = [inputs] * number
    if len(inputs) != number:
        raise ConfigurationError(f"assistant_inputs has {len(inputs)} entries for {number} assistant(s).")
    return list(inputs)


def _own_prompts(inputs: Mapping[str, Tensor], rows: int, copies: int) -> list[list[int]]:
    prompts = _token_lists(inputs["input_ids"], inputs.get("attention_mask"))
    if len(prompts) * copies != rows:
        raise ConfigurationError(
            f"assistant_inputs has {len(prompts)} rows and the base's input {rows // copies}: one prompt for each."
        )
    return [prompt for prompt in prompts for _ in range(copies)]


def _token_lists(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The tokens of each row that the mask keeps, so that padding is read by nobody."""
    if attention_mask is None:
        return input_ids.tolist()
    prompts = [ids[keep.bool()].tolist() for ids, keep in zip(input_ids, attention_mask, strict=True)]
    if not all(prompts):
        raise ConfigurationError("A row of attention_mask is all zeros: every row needs at least one prompt token.")
    return prompts


def _is_row_wise(processor: Any) -> bool:
    """Whether a processor treats each row by itself. Processors of transformers do, but for those of `WHOLE_BATCH`."""
    own = type(processor).__module__.startswith("transformers.")
    return own and not isinstance(processor, WHOLE_BATCH)


def _streaming(streamer: BaseStreamer | None) -> Any:
    if streamer is None or isinstance(streamer, SourceStreamer):
        return None if streamer is None else streamer.put
    return lambda tokens, source: streamer.put(tokens)
