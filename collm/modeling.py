"""`CoLLMForCausalLM`: any decoder-only architecture of transformers with a deferral head.

It is a mixin over the architecture's own class. For a Llama checkpoint, `CoLLMForCausalLM.from_pretrained` builds
(once) `class CoLLMLlamaForCausalLM(CoLLMForCausalLM, LlamaForCausalLM)`, so that everything transformers, PEFT,
accelerate and DeepSpeed know about Llama holds for it, and its checkpoint is an ordinary Llama checkpoint plus
`deferral_head.weight`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import ModelOutput

from .configuration import DeferralConfig
from .decoding.generation import CollaborativeGenerationMixin
from .errors import ConfigurationError, UnsupportedModelError
from .losses import (
    TokenStatistics,
    deferral_labels,
    divide_by_targets,
    log_joint,
    marginal_likelihood_loss,
    uncertainty_features,
    weak_supervision_loss,
)

# Logits that exist at once while a loss is computed: 128 MiB in float32, about 220 positions of a 150k vocabulary.
# Fewer cost time (each chunk reads the LM head and adds to its gradient), more cost memory: benchmarks/loss.
LOGITS_PER_CHUNK = 2**25


class TargetScores(NamedTuple):
    """What the base and the head say about each target token; N targets, F features, K assistants.

    features: `(N, F)` float32, what the head reads (uncertainty features not yet standardised).
    base_logprobs: `(N,)` float32, log P_0(x_t | x_<t), nats.
    base_correct: `(N,)` bool, whether the base's argmax is the target.
    deferral_logits: `(N, K)` float32.
    index: `(N, 2)` long, row and position of each target in `labels`.
    """

    features: Tensor
    base_logprobs: Tensor
    base_correct: Tensor
    deferral_logits: Tensor
    index: Tensor  # type: ignore[assignment]


class _Scores(NamedTuple):
    """Of N target tokens; see [`TargetScores`]."""

    features: Tensor
    base_logprobs: Tensor
    base_correct: Tensor
    deferral_logits: Tensor


if TYPE_CHECKING:

    class _Mixin(CollaborativeGenerationMixin, PreTrainedModel):
        """What it is always mixed into."""

else:
    _Mixin = CollaborativeGenerationMixin


class CoLLMForCausalLM(_Mixin):
    """A causal language model that knows when to ask: the architecture's own class plus `deferral_head`.

    Never instantiated by itself: use [`from_pretrained`], [`from_config`] or [`from_base`], which return an instance of
    both this class and the architecture's (`LlamaForCausalLM`, ...).

    Attributes:
        deferral_head (`torch.nn.Linear`): features to K logits; float32 weights, evaluated in float32.
        config.deferral ([`DeferralConfig`]): what the head sees, its assistants, threshold and calibration table.
        training_statistics (`dict[str, torch.Tensor]`): sums over target tokens since they were last taken; see
            [`take_training_statistics`].

    Reference: Shen et al., *Learning to Decode Collaboratively with Multiple Language Models*, ACL 2024.
    """

    base_class: type[PreTrainedModel]  # the architecture's own class, set on each CoLLM<Base>
    # float32 beside a bfloat16 base, and (by the first) left alone by quantisation.
    _keep_in_fp32_modules = ["deferral_head"]
    _keep_in_fp32_modules_strict = ["deferral_head"]
    accepts_loss_kwargs = True  # num_items_in_batch, whatever the architecture says of its own loss (Gemma 4: no)

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        if type(self) is CoLLMForCausalLM:
            raise ConfigurationError(
                "CoLLMForCausalLM is a mixin over an architecture's own class: call its from_pretrained(name), "
                "from_config(config) or from_base(model) instead of the class itself."
            )
        super().__init__(config, *args, **kwargs)
        self._attach_head(config.deferral if hasattr(config, "deferral") else None)

    def _attach_head(self, deferral: DeferralConfig | dict[str, Any] | None) -> None:
        self.config.deferral = DeferralConfig.from_any(deferral)
        lm_head = self.get_output_embeddings()
        if lm_head is None or not decoder_path(self):
            raise UnsupportedModelError(
                f"{self.base_class.__name__} has no LM head over a decoder, and a deferral head reads what the LM head "
                "reads. Take a decoder-only language model."
            )
        hidden_size = lm_head.in_features if isinstance(lm_head, nn.Linear) else lm_head.weight.shape[-1]
        self.deferral_head = nn.Linear(
            self.config.deferral.head_size(hidden_size),
            self.config.deferral.num_assistants,
            bias=self.config.deferral.bias,
            dtype=torch.float32,
            device=lm_head.weight.device,
        )
        self._init_weights(self.deferral_head)
        self.training_statistics: dict[str, Tensor] = {}

    def _init_weights(self, module: nn.Module) -> None:
        if module is not getattr(self, "deferral_head", None):
            return super()._init_weights(module)
        init.zeros_(module.weight)  # d = 0.5 everywhere until it is trained
        if module.bias is not None:
            init.zeros_(module.bias)

    # ------------------------------------------------------------------------------------------------ construction

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *args: Any,
        num_assistants: int | None = None,
        deferral: DeferralConfig | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a deferral checkpoint, or any causal language model with a new head.

        Args:
            pretrained_model_name_or_path (`str`): Hub id or folder of: a causal language model (the head is new, zero,
                so d = 0.5); a deferral checkpoint; a head-only or LoRA checkpoint of one, which names its base; or a
                checkpoint of the paper's code, whose `<|defer|>` vocabulary row becomes the head.
            num_assistants (`int`, *optional*): K of a new head, default 1. Given for a trained head, it must agree.
            deferral ([`DeferralConfig`] or `dict`, *optional*): settings of a new head; for a trained head, fields that
                do not change its shape (threshold, deferral_cost, ...) replace the saved ones.
            kwargs: as in transformers' `from_pretrained` (`dtype`, `device_map`, `attn_implementation`,
                `quantization_config`, `revision`, `token`, ...).

        Returns:
            An instance of `CoLLM<Base>`; with `output_loading_info=True` also transformers' dictionary.

        Raises:
            CheckpointError: nothing can be read there, a file is damaged, or the head has another K.
            UnsupportedModelError: an encoder, an encoder-decoder, or no language model at all.
        """
        if cls is not CoLLMForCausalLM:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        from .checkpoints import load_deferral_checkpoint  # it builds on this module

        return load_deferral_checkpoint(
            str(pretrained_model_name_or_path), *args, num_assistants=num_assistants, deferral=deferral, **kwargs
        )

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        num_assistants: int = 1,
        deferral: DeferralConfig | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Build a model with random weights and a zero head from an architecture's config."""
        config.deferral = DeferralConfig.from_any(deferral or {"num_assistants": num_assistants})
        return collm_class(base_class_for(config))._from_config(config, **kwargs)  # type: ignore[arg-type]

    @classmethod
    def from_base(
        cls, model: PreTrainedModel, num_assistants: int = 1, deferral: DeferralConfig | dict[str, Any] | None = None
    ) -> Any:
        """Turn a loaded causal language model into a `CoLLM<Base>` in place: its own parameters, and a new head."""
        if isinstance(model, cls):
            raise ConfigurationError("this model has a deferral head already.")
        target = collm_class(base_class_for(model.config, type(model)))  # type: ignore[arg-type]
        model.__class__ = target
        model._attach_head(deferral or {"num_assistants": num_assistants})
        for kept in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            setattr(model, kept, {*(getattr(model, kept) or ()), "deferral_head"})
        return model

    @classmethod
    def is_custom_code(cls) -> bool:
        """As the architecture says: transformers converts the weights in files for what it takes as its own only."""
        return cls.base_class.is_custom_code()

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers (same arguments); config.json names `CoLLMForCausalLM` as its architecture.

        A head file or an adapter that lies in the folder goes: it would be loaded instead of what is saved here.
        """
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            self.config.architectures = ["CoLLMForCausalLM"]
            self.config.save_pretrained(save_directory)
            self._remove_other_forms(save_directory)

    def _remove_other_forms(self, folder: str | os.PathLike[str]) -> None:
        from .checkpoints import remove_other_forms

        if not self._hf_peft_config_loaded:  # of a model with adapters, transformers writes these alone
            remove_other_forms(folder)

    def push_to_hub(self, repo_id: str, *, head_only: bool = False, **kwargs: Any) -> Any:
        """Upload the checkpoint with a model card that says how to use it and what it knows of its training.

        Args:
            repo_id (`str`): `"me/name"`; created where missing.
            head_only (`bool`, *optional*, defaults to `False`): upload config.json and the head alone, a few kilobytes
                that name their base (`config.deferral.base_model`); right only where the base was not trained.
            kwargs: as in transformers' `push_to_hub` (`private`, `token`, `revision`, `create_pr`, `commit_message`,
                `max_shard_size`, ...); with `head_only` as in [`~collm.hub.push_checkpoint`].

        Raises:
            HubError: the Hub refuses (401, 403, 404, ...) or cannot be reached.
            CheckpointError: with `head_only`, the base was trained, or has no name that others can load.
        """
        from . import hub
        from .checkpoints import save_head_only

        if head_only:
            with tempfile.TemporaryDirectory() as folder:
                save_head_only(self, folder)
                return hub.push_checkpoint(folder, repo_id, **kwargs)
        with hub.hub_errors(repo_id):
            return super().push_to_hub(repo_id, **kwargs)

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], repo_id: str, files_timestamps: dict[str, float], **kwargs: Any
    ) -> Any:
        # transformers calls this when files are written, from push_to_hub and save_pretrained(push_to_hub=True).
        from .hub import upload_saved

        self._remove_other_forms(working_dir)
        return upload_saved(Path(working_dir), repo_id, files_timestamps, **kwargs)

    # ---------------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        assistant_logprobs: Tensor | None = None,
        assistant_correct: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_logits: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The architecture's own forward, plus the head; with `labels`, the loss of `config.deferral.objective`.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`), attention_mask and kwargs: as for the base.
            labels (`torch.LongTensor` of shape `(batch, seq)`, *optional*): target tokens, unshifted as everywhere in
                transformers (labels[b, t] is predicted from what precedes t); -100 marks tokens that are no targets.
            assistant_logprobs (`torch.FloatTensor` of shape `(batch, seq, K)`, *optional*): nats; entry [b, t] belongs
                to labels[b, t]. Without it the loss is the base's own cross-entropy and the head learns nothing.
            assistant_correct (`torch.BoolTensor` of shape `(batch, seq, K)`, *optional*): whether assistant k's argmax
                is labels[b, t]; needed for the objective `"weak_supervision"`.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): the loss's N, from the Trainer.
            output_logits (`bool`, *optional*): with `labels`, also return the logits of all positions (otherwise they
                never exist at once).

        Returns:
            The base's output with `deferral_logits` (`torch.FloatTensor` of shape `(batch, kept positions, K)`),
            float32, for the positions of `logits`. With `labels`: `loss` of shape `()`, and `logits` and
            `deferral_logits` are `None` unless `output_logits`.
        """
        return_dict = kwargs.pop("return_dict", None)
        if labels is None:
            with _inputs_of(self.get_output_embeddings()) as seen:
                base = super().forward(input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
            outputs = _with_deferral(base, deferral_logits=self._deferral_logits(seen[0], base.logits))
        else:
            outputs = self._forward_with_loss(
                input_ids, attention_mask, labels, assistant_logprobs, assistant_correct, num_items_in_batch,
                output_logits, kwargs,
            )  # fmt: skip
        return outputs.to_tuple() if return_dict is False else outputs

    def _forward_with_loss(
        self, input_ids, attention_mask, labels, assistant_logprobs, assistant_correct, num_items_in_batch,
        output_logits, kwargs,
    ) -> ModelOutput:  # fmt: skip
        # 1. Run the decoder; its LM head only on the last position, unless logits are asked for.
        self._check_scores(assistant_logprobs, assistant_correct)
        kwargs.setdefault("use_cache", False)
        if not output_logits:
            kwargs["logits_to_keep"] = 1
        with (
            _output_of(self.get_submodule(decoder_path(self))) as decoded,
            _inputs_of(self.get_output_embeddings()) as seen,
        ):
            base = super().forward(input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)

        # 2. The loss of the targets, a sum over chunks of them; per target token, not per micro-batch.
        targets = _targets(labels)
        hidden, tokens = _at_targets(decoded[0][0], targets), labels[:, 1:][targets]
        loss = self._summed_loss(hidden, tokens, _at(assistant_logprobs, targets), _at(assistant_correct, targets))
        loss = divide_by_targets(loss, len(tokens), num_items_in_batch)

        # 3. The load-balancing loss of a mixture of experts is the architecture's own, with its own weight.
        if base.get("aux_loss") is not None:
            weight = self.config.get_text_config(decoder=True).router_aux_loss_coef
            loss = loss + weight * base.aux_loss.to(loss.device)
        if output_logits:
            return _with_deferral(base, loss=loss, deferral_logits=self._deferral_logits(seen[0], base.logits))
        return _with_deferral(base, loss=loss, logits=None)

    def _check_scores(self, assistant_logprobs: Tensor | None, assistant_correct: Tensor | None) -> None:
        K = self.config.deferral.num_assistants
        if assistant_logprobs is None:
            if self.training:
                warnings.warn(
                    "CoLLMForCausalLM got labels without assistant_logprobs: the loss is the base's own cross-entropy "
                    "and the deferral head learns nothing. Score the data with `collm score` first.",
                    stacklevel=6,
                )
        elif assistant_logprobs.shape[-1] != K:
            raise ConfigurationError(
                f"assistant_logprobs has {assistant_logprobs.shape[-1]} assistants in its last axis, the head has {K}: "
                f"its shape must be (batch, seq, {K})."
            )
        elif self.config.deferral.objective == "weak_supervision" and assistant_correct is None:
            raise ConfigurationError("objective='weak_supervision' needs assistant_correct besides assistant_logprobs.")

    @torch.compiler.disable
    def _summed_loss(
        self, hidden: Tensor, tokens: Tensor, assistant_logprobs: Tensor | None, assistant_correct: Tensor | None
    ) -> Tensor:
        """Sum over the targets of what `config.deferral.objective` says.

        hidden `(N, H)`: decoder output at the positions that predict `tokens` `(N,)`; of the assistants: `(N, K)`.
        """
        parameters = self._parameters_after_decoder() if torch.is_grad_enabled() else []
        size = self._targets_per_chunk()
        # An empty batch is one empty chunk: every parameter takes part in every backward, as DDP and ZeRO require.
        given = [_split(x, size, len(tokens)) for x in (tokens, assistant_logprobs, assistant_correct)]
        rest = [tuple(None if x is None else x.to(hidden.device) for x in row) for row in zip(*given, strict=True)]
        if all(_is_whole(parameter) for parameter in parameters):
            total, base_logprobs, deferral_logits = _SumOfChunks.apply(
                self._chunk_loss, rest, size, hidden, *parameters
            )
        else:
            step = functools.partial(checkpoint, self._chunk_loss, use_reentrant=False, preserve_rng_state=False)
            chunks = [step(rows, *arguments) for rows, arguments in zip(hidden.split(size), rest, strict=True)]
            total, base_logprobs, deferral_logits = _put_together(chunks)
        if self.training and assistant_logprobs is not None:
            self._record(base_logprobs, deferral_logits, assistant_logprobs.to(hidden.device))
        return total

    def _chunk_loss(
        self, hidden: Tensor, tokens: Tensor, assistant_logprobs: Tensor | None, assistant_correct: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Summed loss of a chunk, and the base's log-probabilities and deferral logits that it was made from."""
        scores, deferral = self._score(hidden, tokens), self.config.deferral
        if assistant_logprobs is None:
            # The head takes part in the graph with gradient 0, as DDP and ZeRO require of every parameter.
            loss = -scores.base_logprobs.sum() + 0 * scores.deferral_logits.sum()
        elif deferral.objective == "weak_supervision":
            assert assistant_correct is not None  # checked before the decoder ran
            labels = deferral_labels(scores.base_correct, assistant_correct, assistant_logprobs, "a")
            loss = weak_supervision_loss(scores.base_logprobs, scores.deferral_logits, labels, num_items_in_batch=1)
        else:
            judged = scores.base_logprobs, assistant_logprobs, scores.deferral_logits
            loss = marginal_likelihood_loss(*judged, deferral.deferral_cost, num_items_in_batch=1)
        return loss, scores.base_logprobs, scores.deferral_logits

    def _targets_per_chunk(self) -> int:
        # Not from the LM head's weight, which is empty between uses under ZeRO-3.
        return max(1, LOGITS_PER_CHUNK // self.config.get_text_config(decoder=True).vocab_size)

    def _parameters_after_decoder(self) -> list[Tensor]:
        """LM head (wherever it lies, it may be tied), deferral head, and whatever else the decoder does not hold."""
        lm_head = self.get_output_embeddings()
        found = [lm_head.weight, *lm_head.parameters()]
        found += [p for name, p in self.named_parameters() if not name.startswith(f"{decoder_path(self)}.")]
        return list({id(p): p for p in found if p.requires_grad}.values())

    @torch.no_grad()
    def score_targets(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> TargetScores:
        """Run the base over a batch and return, for each target token, what the head reads and what the base says.

        Args:
            input_ids, attention_mask, labels: as in [`forward`]; without `labels`, every token that the attention mask
                keeps is a target, except the first of a row.

        Returns:
            [`TargetScores`]; the logits of all positions never exist at once.
        """
        if labels is None:
            labels = input_ids
            if attention_mask is not None:
                kept = attention_mask != 0
                kept[:, 1:] &= attention_mask[:, :-1] != 0  # a token behind padding is predicted by nothing
                labels = input_ids.masked_fill(~kept, -100)
        kwargs.setdefault("use_cache", False)
        with _output_of(self.get_submodule(decoder_path(self))) as decoded:
            super().forward(input_ids, attention_mask=attention_mask, return_dict=True, logits_to_keep=1, **kwargs)
        targets = _targets(labels)
        hidden, tokens = _at_targets(decoded[0][0], targets), labels[:, 1:][targets]
        size = self._targets_per_chunk()
        chunks = zip(hidden.split(size), tokens.to(hidden.device).split(size), strict=True)
        scores = _Scores(*(torch.cat(column) for column in zip(*(self._score(h, t) for h, t in chunks), strict=True)))
        return TargetScores(**scores._asdict(), index=targets.nonzero() + torch.tensor([0, 1], device=labels.device))

    def _score(self, hidden: Tensor, tokens: Tensor) -> _Scores:
        """Score N tokens, given the decoder's output `(N, H)` at the positions that predict them."""
        seen, logits = _run_lm_head(self, hidden.unsqueeze(0))
        base_logprobs, base_correct, uncertainty = TokenStatistics.apply(logits[0], tokens)
        features = self._features(seen[0], uncertainty)
        return _Scores(features, base_logprobs, base_correct, self._head(features))

    def _features(self, seen: Tensor, uncertainty: Tensor) -> Tensor:
        """f_t: what the LM head reads and/or the base's uncertainty, `(..., F)` float32."""
        parts = {"hidden": seen.float(), "uncertainty": uncertainty}
        return torch.cat([part for name, part in parts.items() if name in self.config.deferral.features], dim=-1)

    def _head(self, features: Tensor) -> Tensor:
        """z_t = W f_t in float32 with the uncertainty features standardised: `(..., K)`."""
        with torch.autocast(features.device.type, enabled=False):
            return self.deferral_head(self.standardise(features).to(self.deferral_head.weight.dtype)).float()

    def standardise(self, features: Tensor) -> Tensor:
        """Subtract `uncertainty_mean` and divide by `uncertainty_std` in the last four columns; `(..., F)` float32."""
        deferral = self.config.deferral
        if "uncertainty" not in deferral.features:
            return features
        hidden, numbers = features.split([features.shape[-1] - 4, 4], dim=-1)
        mean, std = (features.new_tensor(x) for x in (deferral.uncertainty_mean, deferral.uncertainty_std))
        return torch.cat([hidden, (numbers - mean) / std], dim=-1)

    def _deferral_logits(self, seen: Tensor, logits: Tensor) -> Tensor:
        return self._head(self._features(seen, uncertainty_features(logits)))

    # ----------------------------------------------------------------------------------------- training statistics

    @torch.no_grad()
    def _record(self, base_logprobs: Tensor, deferral_logits: Tensor, assistant_logprobs: Tensor) -> None:
        joint = log_joint(base_logprobs, assistant_logprobs, deferral_logits)
        batch = {
            "tokens": joint.new_tensor(len(joint)),
            "base_nll": -base_logprobs.sum(),
            "assistant_nll": -assistant_logprobs.float().clamp_min(-1e4).sum(0),
            "deferral_probability": torch.sigmoid(torch.logsumexp(deferral_logits, -1)).sum(),
            "posterior": joint.softmax(-1)[:, 1:].sum(0),
        }
        for name, value in batch.items():
            self.training_statistics[name] = self.training_statistics.get(name, 0) + value

    def take_training_statistics(self) -> dict[str, Tensor]:
        """Return the sums over target tokens since the last call, and start anew.

        Returns:
            `dict`: `tokens` (), `base_nll` () and `assistant_nll` (K,) in nats, `deferral_probability` () and
            `posterior` (K,), the share of each assistant in the posterior of who wrote the tokens; divide by `tokens`.
        """
        taken, self.training_statistics = self.training_statistics, {}
        return taken


# -------------------------------------------------------------------------------------------------- loss in chunks


class _SumOfChunks(torch.autograd.Function):
    """Sum of a function over chunks of rows, its gradients taken in forward, chunk by chunk.

    No chunk's logits outlive it and none are computed a second time. What is kept for backward are the gradients of the
    sum, as large as `hidden` and as the parameters. `function(rows, *arguments)` returns the value to be summed and
    further tensors, which come back put together and without gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, function: Any, rest: list[tuple[Any, ...]], size: int, hidden: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        results: list[list[Tensor]] = []
        of_hidden: list[Tensor] = []
        of_parameters: list[Tensor] = []
        for rows, arguments in zip(hidden.split(size), rest, strict=True):
            rows = rows.detach().requires_grad_(hidden.requires_grad)
            wanted = [x for x in (rows, *parameters) if x.requires_grad]
            with torch.set_grad_enabled(bool(wanted)):
                value, *others = function(rows, *arguments)
            results.append([x.detach() for x in (value, *others)])
            if wanted:
                gradients = list(torch.autograd.grad(value, wanted, materialize_grads=True))
                of_hidden += [gradients.pop(0)] if rows.requires_grad else []
                pairs = zip(of_parameters, gradients, strict=True)
                of_parameters = [a.add_(b) for a, b in pairs] if of_parameters else gradients
        ctx.of_hidden = bool(of_hidden)
        ctx.save_for_backward(*([torch.cat(of_hidden)] if of_hidden else []), *of_parameters)
        total, *others = _put_together(results)
        ctx.mark_non_differentiable(*others)
        return total, *others

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        scaled = [gradient * of_sum for of_sum in ctx.saved_tensors]
        return None, None, None, *([] if ctx.of_hidden else [None]), *scaled


def _put_together(chunks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    values, *others = zip(*chunks, strict=True)
    return [torch.stack(values).sum(), *(torch.cat(column) for column in others)]


def _split(values: Tensor | None, size: int, length: int) -> Iterable[Tensor | None]:
    return [None] * max(1, -(-length // size)) if values is None else values.split(size)


def _is_whole(parameter: Tensor) -> bool:
    """False for FSDP's views of a flat parameter and ZeRO-3's partitions: they need their own backward hooks."""
    return isinstance(parameter, nn.Parameter) and not hasattr(parameter, "ds_id")


# ------------------------------------------------------------------------------------------------- classes and helpers


def base_class_for(config: PreTrainedConfig, given: type[PreTrainedModel] | None = None) -> type[PreTrainedModel]:
    """The class that `AutoModelForCausalLM` takes for `config` (or `given`, where a model is loaded already).

    Raises:
        UnsupportedModelError: encoders, encoder-decoders, and architectures without a causal language model.
    """
    name = getattr(config, "model_type", type(config).__name__)
    advice = "Take a decoder-only language model, one that AutoModelForCausalLM loads."
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f'"{name}" is an encoder-decoder; deferral is defined for one stream of tokens. {advice}'
        )
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise UnsupportedModelError(f'"{name}" is an encoder: it sees the tokens that it should predict. {advice}')
    if given is not None:
        return given
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f'"{name}" is not a causal language model. {advice}')
    classes = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return classes[0] if isinstance(classes, (list, tuple)) else classes


_NOT_KEYWORDS = ("self", "input_ids", "attention_mask", "args", "kwargs")


@functools.cache
def collm_class(base_class: type[PreTrainedModel]) -> type[CoLLMForCausalLM]:
    """`CoLLM<Base>`, built once for each architecture."""

    def forward(self: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return CoLLMForCausalLM.forward(self, input_ids, attention_mask, **kwargs)

    # transformers reads the signature to check generate's arguments, keep a data set's columns, pass positions.
    ours = inspect.signature(CoLLMForCausalLM.forward).parameters
    theirs = inspect.signature(base_class.forward).parameters
    positional = list(inspect.signature(forward).parameters.values())[:-1]
    named = {**theirs, **ours}
    keywords = [named[n].replace(kind=inspect.Parameter.KEYWORD_ONLY) for n in named if n not in _NOT_KEYWORDS]
    forward.__signature__ = inspect.Signature([*positional, *keywords, ours["kwargs"]])  # type: ignore[attr-defined]
    namespace = {
        "__module__": __name__,
        "__doc__": CoLLMForCausalLM.__doc__,
        "forward": forward,
        "base_class": base_class,
        "_keep_in_fp32_modules": [*(base_class._keep_in_fp32_modules or []), "deferral_head"],
        "_keep_in_fp32_modules_strict": [*(base_class._keep_in_fp32_modules_strict or []), "deferral_head"],
    }
    # What transformers files under the name of a class (GPT-NeoX: the LM head's old name) holds for ours too.
    conversion = get_checkpoint_conversion_mapping(base_class.__name__)
    if conversion is not None:
        register_checkpoint_conversion_mapping(f"CoLLM{base_class.__name__}", conversion, overwrite=True)
    return type(f"CoLLM{base_class.__name__}", (CoLLMForCausalLM, base_class), namespace)  # type: ignore[return-value]


def __getattr__(name: str) -> Any:
    """Find `CoLLM<Base>` by name, so that a pickled model loads in a process that has not built the class yet."""
    base_class = getattr(transformers, name.removeprefix("CoLLM"), None) if name.startswith("CoLLM") else None
    if isinstance(base_class, type) and issubclass(base_class, PreTrainedModel):
        return collm_class(base_class)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _output_class(base: type[ModelOutput]) -> type[ModelOutput]:
    return dataclasses.make_dataclass(
        f"CoLLM{base.__name__}",
        [("deferral_logits", "torch.Tensor | None", dataclasses.field(default=None))],
        bases=(base,),
        namespace={"__module__": __name__},
    )


def _with_deferral(base: ModelOutput, **values: Any) -> Any:
    return _output_class(type(base))(**{**base, **values})  # type: ignore[arg-type]


def _targets(labels: Tensor) -> Tensor:
    """`(batch, seq - 1)` bool: whether position t predicts a target, labels[:, t + 1] != -100."""
    return labels[:, 1:] != -100


def _at_targets(hidden: Tensor, targets: Tensor) -> Tensor:
    """`(N, H)`: the decoder's output, on whatever device it lies, at the positions that predict a target."""
    return hidden[:, :-1][targets.to(hidden.device)]


def _at(values: Tensor | None, targets: Tensor) -> Tensor | None:
    return None if values is None else values[:, 1:][targets.to(values.device)]


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the first argument of every call of `module` (for the LM head, h_t), whichever thread it comes from."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _output_of(module: nn.Module) -> Iterator[list[Any]]:
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def decoder_path(model: PreTrainedModel) -> str:
    """Name of the module that the architecture's forward runs before the LM head; empty where there is none."""
    base = model.base_model
    if base is model:
        return "model" if isinstance(getattr(model, "model", None), PreTrainedModel) else ""  # Llama 4's text model
    prefix = model.base_model_prefix
    return f"{prefix}.decoder" if isinstance(getattr(base, "decoder", None), PreTrainedModel) else prefix  # OPT


class _StandIn:
    """A module with one of its children replaced."""

    def __init__(self, module: nn.Module, child: str, replacement: Any) -> None:
        self._module = module
        setattr(self, child, replacement)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Decoded:
    """Stands for a decoder that has run: a model's own forward then computes LM head, capping and scaling alone."""

    def __init__(self, decoder: nn.Module, hidden: Tensor) -> None:
        self._decoder, self._output = decoder, _DecoderOutput(last_hidden_state=hidden)
        self.called = False

    def __call__(self, *args: Any, **kwargs: Any) -> ModelOutput:
        self.called = True
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


class _DecoderOutput(MoeModelOutputWithPast):
    """A decoder output whose fields other than the hidden state are `None`, whatever the architecture calls them."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@functools.cache
def _architecture_forward(model_class: type) -> tuple[Any, dict[str, Any]]:
    forward = model_class.base_class.forward if issubclass(model_class, CoLLMForCausalLM) else model_class.forward  # type: ignore[attr-defined]
    asked = {"use_cache": False, "output_router_logits": False}
    return forward, {name: value for name, value in asked.items() if name in inspect.signature(forward).parameters}


def _run_lm_head(model: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What the LM head reads, and the logits, given the decoder's output."""
    forward, arguments = _architecture_forward(type(model))  # type: ignore[arg-type]
    path = decoder_path(model)
    standing: Any = (decoded := _Decoded(model.get_submodule(path), hidden))
    while path:
        path, _, child = path.rpartition(".")
        standing = _StandIn(model.get_submodule(path), child, standing)
    with _inputs_of(model.get_output_embeddings()) as seen:
        output = forward(standing, inputs_embeds=hidden, return_dict=True, **arguments)
    if not decoded.called:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run its decoder `{decoder_path(model)}` as a whole."
        )
    return seen[0], output.logits


def lm_head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits of any causal language model from its decoder's output, by the architecture's own code.

    Runs the model's `forward` with the decoder replaced by `hidden`, so that the LM head and whatever the architecture
    does to its logits (soft-capping, scaling) are exactly its own, on as many positions as fit in memory.

    Args:
        model ([`~transformers.PreTrainedModel`]): with or without a deferral head.
        hidden (`torch.Tensor` of shape `(batch, positions, hidden)`): `last_hidden_state` of the decoder (see
            [`decoder_path`]).

    Returns:
        `torch.Tensor` of shape `(batch, positions, vocabulary)`, in the model's dtype.
    """
    return _run_lm_head(model, hidden)[1]
