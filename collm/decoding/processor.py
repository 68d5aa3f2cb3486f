"""`CollaborativeLogitsProcessor`: deferral one step at a time, for composing with any `generate` of transformers."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from collm.errors import ConfigurationError
from collm.losses import deferral_probabilities

from .cache import reader_for
from .combiners import CombiningContext, resolve_combiner
from .generation import check_assistants, resolve_threshold
from .loop import fit_vocabulary
from .registry import Spec
from .routers import RoutingContext, resolve_router, route


class CollaborativeLogitsProcessor(LogitsProcessor):
    """Replaces the base's scores by an assistant's where the deferral head asks for it.

    Pass it in `logits_processor=[...]` of the deferral model's own `generate`: beam search, contrastive search,
    constrained decoding and whatever else composes with a logits processor. What it costs, compared with
    `generate(assistant=...)`: every deferred token is a pass of the assistant, alone (no speculation); the base also
    steps where the assistant writes; and transformers runs processors of the user's after those of the generation
    config and before its warpers, so penalties have been applied to the base's scores and are not applied to the
    assistant's, while temperature and top-k apply to both. Each model still reads every token once; where a beam jumps
    to another beginning, the assistant reads again from where it differs.

    Scores of an assistant are log-probabilities, which is what beam search adds up.

    Args:
        model ([`CoLLMForCausalLM`]): the model whose `generate` is called; its forwards are watched for the head's
            logits.
        assistant, threshold, deferral_rate, router, combiner: as for [`CoLLMForCausalLM.generate`]. Combiners that need
            further models, and routers with a memory, are not available here.
        pad_token_id (`int`, *optional*): padding at the left of `input_ids`, which the assistant must not read.

    Raises:
        [`ConfigurationError`]: at the first token, of a router with a memory: the rows of beam search change places.

    Example:

    ```python
    >>> processor = CollaborativeLogitsProcessor(model, big, threshold=0.6, pad_token_id=tokenizer.pad_token_id)
    >>> model.generate(**inputs, num_beams=4, logits_processor=[processor])
    ```
    """

    def __init__(
        self,
        model: Any,
        assistant: PreTrainedModel | list[PreTrainedModel],
        threshold: float | None = None,
        deferral_rate: float | None = None,
        router: Spec | None = None,
        combiner: Spec | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        self.router, self.combiner = resolve_router(router), resolve_combiner(combiner)
        eta = resolve_threshold(model, threshold, deferral_rate, self.router)
        self.threshold = torch.tensor(eta, device=model.device) if isinstance(eta, list) else eta
        self.readers = [reader_for(m, columns=256) for m in check_assistants(model, assistant)]
        self.read: list[dict[int, list[int]]] = [{} for _ in self.readers]
        self.pad_token_id, self.prompt_width, self.width = pad_token_id, 0, -1
        # The model must not keep the processor and its caches alive: its hook knows this dictionary alone.
        seen: dict[str, Tensor] = {}
        self.seen = seen
        handle = model.register_forward_hook(
            lambda module, args, output: seen.update(deferral_logits=output.get("deferral_logits"))
        )
        weakref.finalize(self, handle.remove)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        deferral_logits = self.seen.get("deferral_logits")
        assert deferral_logits is not None, "the processor belongs to the generate of the model it was made for"
        if input_ids.shape[1] != self.width + 1:  # not the next step of the same text: a new prompt
            self.prompt_width = input_ids.shape[1]
        self.width = input_ids.shape[1]
        step = torch.full((len(scores),), input_ids.shape[1] - self.prompt_width, device=scores.device)
        pi = deferral_probabilities(deferral_logits[:, -1]).to(scores.device)
        uniform = torch.rand(len(scores), dtype=torch.float64, device=scores.device)
        context = RoutingContext(pi, self.threshold, scores, step, uniform)
        writers, state = route(self.router, context)
        if state is not None:
            raise ConfigurationError(
                "a router with a memory cannot be used in a logits processor, whose rows change places: pass router= "
                "and assistant= to generate instead."
            )
        scores = scores.clone()
        for k in set(writers.tolist()) - {0}:
            rows = (writers == k).nonzero().squeeze(1)
            logits = fit_vocabulary(self._catch_up(k - 1, rows.tolist(), input_ids).to(scores.device), scores.shape[-1])
            theirs = CombiningContext(scores[rows], logits, context.deferral_probs[rows])
            scores[rows] = self.combiner.function(theirs).float().log_softmax(dim=-1).to(scores.dtype)
        return scores

    def _catch_up(self, k: int, rows: list[int], input_ids: Tensor) -> Tensor:
        """The assistant's next-token logits `(rows, vocabulary)`; it reads what it has not read of these rows."""
        reader, chunks = self.readers[k], []
        for row in rows:
            tokens = input_ids[row].tolist()
            while tokens[0] == self.pad_token_id:
                tokens.pop(0)
            known = self.read[k].get(row, [])
            same = next((i for i, (a, b) in enumerate(zip(known, tokens, strict=False)) if a != b), len(known))
            same = min(same, len(tokens) - 1)
            if reader.can_roll_back:
                reader.roll_back(row, same)
            elif same < len(known):
                reader.drop(row)
                same = 0
            self.read[k][row] = tokens
            chunks.append(tokens[same:])
        return reader.read(rows, chunks).logits[:, -1]
