"""
What the models say about texts that exist: likelihood of base, assistants and their mixture, and routers' scores.

Everything here is teacher-forced, one pass per model over each text. On a text that the pair generated, that pass sees
exactly the decisions that were taken; on other texts it is off the collaborative trajectory, and says so where it
counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collm.data.scoring import LOGITS_PER_CHUNK, plan_batches, score_batch
from collm.errors import ConfigurationError, did_you_mean
from collm.losses import deferral_probabilities, log_joint, uncertainty_features
from collm.modeling import decoder_path, lm_head_logits

Text = tuple[list[int], list[int]]  # input_ids, labels (-100 = not a target)


@dataclass
class TextScores:
    """
    One text, token by token; n targets, K assistants, float32 on the CPU.

    Args:
        base (`torch.Tensor` of shape `(n,)`): log P_0, nats.
        assistants (`torch.Tensor` of shape `(n, K)`): log P_k, nats.
        deferral_logits (`torch.Tensor` of shape `(n, K)`): z_t.
        base_correct (`torch.Tensor` of shape `(n,)`): bool, whether the token is the base's first choice.
        assistant_correct (`torch.Tensor` of shape `(n, K)`): bool, likewise.
    """

    base: Tensor
    assistants: Tensor
    deferral_logits: Tensor
    base_correct: Tensor
    assistant_correct: Tensor

    @property
    def mixture(self) -> Tensor:
        """`(n,)`: log of sum_k pi_k P_k, nats: the marginal model's likelihood."""
        return log_joint(self.base, self.assistants, self.deferral_logits).logsumexp(-1)

    @property
    def deferral_probs(self) -> Tensor:
        """`(n,)`: d_t."""
        return 1 - deferral_probabilities(self.deferral_logits)[:, 0]

    @property
    def differs(self) -> tuple[Tensor, Tensor]:
        """
        Whether the base's first choice differs from that of the assistant which the head prefers, and where that is
        known: two bool tensors `(n,)`. It is known where the token is the first choice of one of them, as every greedy
        token is.
        """
        asked = self.assistant_correct.gather(-1, self.deferral_logits.argmax(-1, keepdim=True)).squeeze(-1)
        return self.base_correct != asked, self.base_correct | asked


@torch.inference_mode()
def score_texts(
    model: Any, assistants: Sequence[Any], texts: Sequence[Text], batch_tokens: int = 2048
) -> list[TextScores]:
    """
    Scores of base, assistants and head for every target of every text, in the order of the texts.

    Args:
        model ([`CoLLMForCausalLM`]): the base with its head.
        assistants (sequence of `PreTrainedModel`): K of them.
        texts (sequence of `(input_ids, labels)`): token lists; the first token is never a target.
        batch_tokens (`int`, *optional*, defaults to 2048): tokens per batch, padding included.
    """
    from tqdm.auto import tqdm

    scores: list[TextScores | None] = [None] * len(texts)
    plan = plan_batches([len(ids) for ids, _ in texts], batch_tokens)
    for rows in tqdm(plan, desc="scoring", unit="batch", disable=None):
        ids, labels = _right_padded([texts[row] for row in rows])
        own = model.score_targets(ids.to(model.device), labels=labels.to(model.device))
        others = [score_batch(a, ids.to(a.device), labels.to(a.device)) for a in assistants]
        columns = [
            own.base_logprobs,
            torch.stack([logprobs.cpu() for logprobs, _ in others], dim=-1),
            own.deferral_logits,
            own.base_correct,
            torch.stack([correct.cpu() for _, correct in others], dim=-1),
        ]
        counts = (labels[:, 1:] != -100).sum(-1).tolist()
        for row, *parts in zip(rows, *(column.cpu().split(counts) for column in columns), strict=True):
            scores[row] = TextScores(*parts)
    return scores  # type: ignore[return-value]


def perplexity(scores: Sequence[TextScores], resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """
    Perplexity of the base, each assistant and the mixture, with 95% intervals (whole texts resampled).

    Returns:
        `dict`: "tokens", "texts", "mean_deferral_probability", and for "base", "assistant_1", ..., "mixture" a dict
        with "nats_per_token", "perplexity", "low", "high" (of the perplexity).
    """
    counts = np.array([len(s.base) for s in scores], dtype=np.float64)
    sums = {"base": [float(s.base.double().sum()) for s in scores]}
    for k in range(scores[0].assistants.shape[1]):
        sums[f"assistant_{k + 1}"] = [float(s.assistants[:, k].double().sum()) for s in scores]
    sums["mixture"] = [float(s.mixture.double().sum()) for s in scores]
    chosen = np.random.default_rng(seed).integers(0, len(scores), (resamples, len(scores)))
    result: dict[str, Any] = {
        "tokens": int(counts.sum()),
        "texts": len(scores),
        "mean_deferral_probability": float(torch.cat([s.deferral_probs for s in scores]).mean()),
    }
    for name, values in sums.items():
        negative = -np.array(values)
        nats = float(negative.sum() / counts.sum())
        resampled = negative[chosen].sum(axis=1) / counts[chosen].sum(axis=1)
        low, high = np.exp(np.quantile(resampled, [0.025, 0.975]))
        result[name] = {
            "nats_per_token": nats,
            "perplexity": math.exp(nats),
            "low": float(low),
            "high": float(high),
        }
    return result


ROUTER_SCORES = ("learned", "ema", "scheduled", "entropy", "top_probability", "margin")


def router_scores(
    router: str, deferral_probs: np.ndarray, uncertainty: dict[str, np.ndarray] | None = None, **parameters: Any
) -> np.ndarray:
    """
    What a router compares with its threshold, for every token of a text, oriented so that larger asks: the numbers
    that a calibration needs. `-score` is the cut where a router asks *below* its cut.

    Args:
        router (`str`): one of `ROUTER_SCORES`.
        deferral_probs (`np.ndarray` of shape `(n,)`): d_t along the text.
        uncertainty (`dict`, *optional*): from [`base_uncertainty`], for the routers by entropy and confidence.
        parameters: the router's own: `decay`, `shape`, `steps`.

    Raises:
        [`ConfigurationError`]: a router that compares nothing with a threshold.
    """
    from collm.decoding.routers import SCHEDULES

    if router == "learned":
        return deferral_probs
    if router == "ema":
        decay = parameters.get("decay", 0.5)
        smoothed: list[float] = []
        for d in deferral_probs.tolist():
            smoothed.append(decay * smoothed[-1] + (1 - decay) * d if smoothed else d)
        return np.array(smoothed)
    if router == "scheduled":
        # d > eta + (1 - eta) g  <=>  (d - g) / (1 - g) > eta
        progress = torch.arange(len(deferral_probs)).float() / max(parameters.get("steps", 32), 1)
        g = SCHEDULES[parameters.get("shape", "linear")](progress.clamp(max=1.0)).numpy()
        return np.where(g < 1, (deferral_probs - g) / np.maximum(1 - g, 1e-9), -np.inf)
    if router in ("entropy", "top_probability", "margin") and uncertainty is not None:
        return uncertainty[router] if router == "entropy" else -uncertainty[router]
    raise ConfigurationError(
        f'the router "{router}" has no threshold to calibrate; those that have: {", ".join(ROUTER_SCORES)}.'
        f"{did_you_mean(router, ROUTER_SCORES)}"
    )


@torch.inference_mode()
def base_uncertainty(model: Any, texts: Sequence[Text]) -> list[dict[str, np.ndarray]]:
    """The base's "entropy" (nats), "top_probability" and "margin" at every target of every text, `(n,)` each."""
    size = max(1, LOGITS_PER_CHUNK // model.get_output_embeddings().weight.shape[0])
    result = []
    for text in texts:
        ids, labels = _right_padded([text])
        hidden = model.get_submodule(decoder_path(model))(input_ids=ids.to(model.device), use_cache=False)[0]
        hidden = hidden[:, :-1][(labels[:, 1:] != -100).to(hidden.device)]
        rows = []
        for part in hidden.split(size):
            logits = lm_head_logits(model, part.unsqueeze(0))[0].float()
            features = uncertainty_features(logits)
            top = logits.softmax(-1).topk(2, dim=-1).values
            rows.append(torch.stack([features[:, 0], top[:, 0], top[:, 0] - top[:, 1]], dim=-1).cpu())
        columns = torch.cat(rows).numpy().astype(np.float64).T
        result.append(dict(zip(("entropy", "top_probability", "margin"), columns, strict=True)))
    return result


@torch.inference_mode()
def other_choices(model: Any, assistants: Sequence[Any], text: Text, source: Sequence[int]) -> list[int | None]:
    """
    What the model that did not write would have written, for every target of a text that a pair generated: the base's
    first choice where an assistant wrote, the first choice of the assistant which the head prefers where the base did
    (None where that assistant is not among `assistants`). For [`~collm.reporting.TokenView`].

    Args:
        text (`(input_ids, labels)`): prompt and generated tokens.
        source (sequence of `int`): who wrote each target.
    """
    ids, labels = _right_padded([text])
    own = model.score_targets(ids.to(model.device), labels=labels.to(model.device))
    preferred = own.deferral_logits.argmax(-1).tolist()
    choices = [_first_choices(one, ids, labels) for one in (model, *assistants)]
    others = [0 if writer else k + 1 for writer, k in zip(source, preferred, strict=True)]
    return [choices[who][t] if who < len(choices) else None for t, who in enumerate(others)]


def _first_choices(model: Any, ids: Tensor, labels: Tensor) -> list[int]:
    size = max(1, LOGITS_PER_CHUNK // model.get_output_embeddings().weight.shape[0])
    hidden = model.get_submodule(decoder_path(model))(input_ids=ids.to(model.device), use_cache=False)[0]
    hidden = hidden[:, :-1][(labels[:, 1:] != -100).to(hidden.device)]
    return [t for part in hidden.split(size) for t in lm_head_logits(model, part.unsqueeze(0))[0].argmax(-1).tolist()]


def _right_padded(texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids, _ in texts)
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in texts])
    labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in texts])
    return ids, labels
