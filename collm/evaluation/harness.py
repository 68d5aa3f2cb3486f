"""
The model `collm` of lm-evaluation-harness: every task of the harness, decoded and scored collaboratively.

The harness (0.4.13) discovers no models of other packages by itself: importing this module registers ours, and
`collm lm-eval` does that and hands its flags to the harness's own command line.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from collm.configuration import DeferralConfig
from collm.data.scoring import LOGITS_PER_CHUNK
from collm.evaluation.loading import load_models
from collm.losses import log_deferral_probabilities

LOGITS_PER_BATCH = 2**28  # logits that one model returns at once: 512 MiB in bfloat16


@register_model("collm")
class CoLLMHarness(HFLM):
    """
    `--model_args pretrained=CHECKPOINT,assistant=NAME,threshold=0.6`.

    `generate_until` decodes with `generate(assistant=...)`. `loglikelihood` is that of the marginal model, exact:
    log sum_k pi(k | x_<t) P_k(x_t | x_<t), summed over the continuation, and its greedy flag whether every token is the
    first choice of that mixture. It depends on no threshold.

    Args:
        pretrained (`str`): a deferral checkpoint.
        assistant (`str`, *optional*): names of the assistants, several separated by `;`; by default as the checkpoint
            says.
        threshold, deferral_rate (`float`, *optional*): when to ask; the checkpoint's threshold by default.
        router, combiner (`str`, *optional*): as in `generate`.
        dtype (`str`, *optional*, defaults to `"auto"`): of base and assistants.
        device (`str`, *optional*): by default a GPU where there is one.
        kwargs: whatever `HFLM` takes (`batch_size`, `max_length`, `add_bos_token`, ...).
    """

    def __init__(
        self,
        pretrained: str,
        assistant: str = "",
        threshold: float | None = None,
        deferral_rate: float | None = None,
        router: str | None = None,
        combiner: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not torch.cuda.is_available():
            device = None if str(device).startswith("cuda") else device  # the harness's default is cuda:0 everywhere
        models = load_models(pretrained, str(assistant).split(";"), dtype, device)
        super().__init__(models.model, tokenizer=models.tokenizer, **{"batch_size": 8, **kwargs})
        self.assistants = models.assistants
        options = {"threshold": threshold, "deferral_rate": deferral_rate, "router": router, "combiner": combiner}
        self.options = {name: value for name, value in options.items() if value is not None}
        # Ill-posed budgets are refused before the harness loads a data set.
        if deferral_rate is not None:
            DeferralConfig.from_any(models.model.config.deferral).threshold_for_rate(deferral_rate)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        sampling = generation_kwargs.get("do_sample") or generation_kwargs.get("temperature", 0.0) > 0.0
        if not sampling:
            generation_kwargs |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return self.model.generate(
            input_ids=context,
            max_new_tokens=max_length - context.shape[1],
            assistant=self.assistants,
            stopping_criteria=StoppingCriteriaList([StopAt(stop, self.tokenizer, context.shape[1])]),
            pad_token_id=self.tokenizer.pad_token_id,
            **self.options,
            **generation_kwargs,
        )

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        from tqdm.auto import tqdm

        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        size = override_bs or (self.max_batch_size if self.batch_size == "auto" else self.batch_size)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm or None) as bar:
            while order:
                batch = order[:size]
                while len(batch) > 1 and len(batch) * self._kept(requests, batch) > self._positions:
                    batch = batch[: len(batch) // 2]
                order = order[len(batch) :]
                for i, result in zip(batch, self._score([requests[i][1:] for i in batch]), strict=True):
                    results[i] = result
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
                bar.update(len(batch))
        return results

    @property
    def _positions(self) -> int:
        return max(1, LOGITS_PER_BATCH // self.model.get_output_embeddings().weight.shape[0])

    def _kept(self, requests: list[tuple[Any, list[int], list[int]]], batch: list[int]) -> int:
        """Positions from the first that predicts a continuation to the end of the longest row."""
        first = min(len(requests[i][1]) for i in batch) - 1
        return max(len(requests[i][1]) + len(requests[i][2]) for i in batch) - 1 - first

    def _score(self, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Marginal log-likelihood (nats) of each continuation after its context, and whether greedy decoding of the
        mixture writes it. Rows longer than the models read lose the beginning of their context."""
        read = [(context + said)[-self.max_length - 1 : -1] for context, said in rows]  # not the last: nothing follows
        pairs = [(ids, said[-len(ids) :]) for ids, (_, said) in zip(read, rows, strict=True)]
        width = max(len(ids) for ids, _ in pairs)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in pairs])
        keep = width - min(len(row) - len(said) for row, said in pairs)
        base = self.model(ids.to(self.model.device), logits_to_keep=keep, use_cache=False)
        others = [a(ids.to(a.device), logits_to_keep=keep, use_cache=False).logits for a in self.assistants]
        results = []
        for i, (row, said) in enumerate(pairs):
            start = len(row) - len(said) - (width - keep)  # the position that predicts the first continuation token
            part = slice(start, start + len(said))
            logprobs, greedy = self._mixture(
                base.logits[i, part], [o[i, part] for o in others], base.deferral_logits[i, part], torch.tensor(said)
            )
            results.append((float(logprobs.double().sum()), bool(greedy.all())))
        return results

    def _mixture(
        self, base: Tensor, others: list[Tensor], deferral_logits: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log sum_k pi_k P_k of each token `(n,)`, and whether the token is the mixture's first choice `(n,)`."""
        size = max(1, LOGITS_PER_CHUNK // (len(others) + 1) // base.shape[-1])
        logprobs, greedy = [], []
        for start in range(0, len(tokens), size):
            part = slice(start, start + size)
            log_pi = log_deferral_probabilities(deferral_logits[part])
            own = base[part].float().log_softmax(-1)
            theirs = [_as_wide(o[part].to(own.device), own.shape[-1]) for o in others]
            joint = [log_pi[:, k : k + 1] + logprob for k, logprob in enumerate([own, *theirs])]
            mixture = torch.stack(joint).logsumexp(0)
            chosen = tokens[part].to(own.device)
            logprobs.append(mixture.gather(-1, chosen.unsqueeze(-1)).squeeze(-1).cpu())
            greedy.append((mixture.argmax(-1) == chosen).cpu())
        return torch.cat(logprobs), torch.cat(greedy)


class StopAt(StoppingCriteria):
    """Ends each row once its new text holds one of the strings, whatever tokens it is made of."""

    def __init__(self, strings: list[str], tokenizer: Any, start: int) -> None:
        self.strings, self.tokenizer, self.start = strings, tokenizer, start
        longest = max((len(tokenizer(s, add_special_tokens=False).input_ids) for s in strings), default=0)
        self.window = longest + 3  # the same text can be cut into other tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tails = input_ids[:, max(self.start, input_ids.shape[1] - self.window) :]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=False)
        return torch.tensor([any(s in text for s in self.strings) for text in texts], device=input_ids.device)


def _as_wide(logits: Tensor, width: int) -> Tensor:
    """Log-probabilities over the base's columns: an assistant's embedding may be padded to another size."""
    logprobs = logits.float().log_softmax(-1)
    if logprobs.shape[-1] >= width:
        return logprobs[:, :width]
    return torch.nn.functional.pad(logprobs, (0, width - logprobs.shape[-1]), value=-torch.inf)
