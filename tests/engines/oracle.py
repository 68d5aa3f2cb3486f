"""A decode that is slow and obvious: one row, no cache, every model reads the whole text at every step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from collm.decoding.routers import RoutingContext, resolve_router, route
from collm.decoding.sampling import uniform
from collm.losses import deferral_probabilities


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    deferral_probs: list[float] = field(default_factory=list)


@torch.no_grad()
def oracle(base, assistants, prompt, max_tokens, threshold, router=None, assistant_prompts=None, stop_ids=()) -> Answer:
    """Greedy collaborative decoding; `base` is a deferral model, `assistants` K models of transformers."""
    router, state, answer = resolve_router(router), None, Answer()
    for step in range(max_tokens):
        out = base(torch.tensor([[*prompt, *answer.tokens]]))
        probs = deferral_probabilities(out.deferral_logits[:, -1])
        noise = torch.tensor([uniform(0, 0, step)], dtype=torch.float64)
        context = RoutingContext(probs, threshold, out.logits[:, -1], torch.tensor([step]), noise, state)
        writers, state = route(router, context)
        k = int(writers)
        if k == 0:
            token = int(out.logits[0, -1].argmax())
        else:
            own = assistant_prompts[k - 1] if assistant_prompts else prompt
            token = int(assistants[k - 1](torch.tensor([[*own, *answer.tokens]])).logits[0, -1].argmax())
        answer.tokens.append(token)
        answer.source.append(k)
        answer.deferral_probs.append(1 - float(probs[0, 0]))
        if token in stop_ids:
            break
    return answer
