"""The oracle: collaborative decoding written as slowly and plainly as it can be. No cache, no batch, explicit sums.

One row at a time; every token runs every model over the whole text; probabilities are lists of Python floats. Nothing
is shared with `collm.decoding` but the random numbers, which are written out again here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

MASK = (1 << 64) - 1


@dataclass
class Written:
    """What was written to a row, and by whom."""

    tokens: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    deferral_probs: list[float] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    raw: list[list[float]] = field(default_factory=list)


def write(
    base, assistants, prompt, *, row=0, seed=0, steps=16, threshold=0.5, router=("learned", {}),
    combiner=("assistant", {}), sample=False, processors=(), shown=None, eos=(), own_prompts=None,
) -> Written:  # fmt: skip
    """Write up to `steps` tokens after `prompt`. `shown`: the prompt as processors see it, with its padding."""
    text, memory, ema = Written(), list(shown or prompt), None
    for step in range(steps):
        output = run(base, prompt + text.tokens)
        base_logits = output.logits[0, -1].tolist()
        z = output.deferral_logits[0, -1].tolist()
        pi = softmax([0.0, *z])
        d = 1 - pi[0]
        favourite = 1 + max(range(len(z)), key=lambda k: pi[k + 1])
        ema = d if ema is None else router[1].get("decay", 0.5) * ema + (1 - router[1].get("decay", 0.5)) * d
        u = uniform(seed, row, step, 1)
        defer = decide(router, base_logits, d, ema, threshold, step, u)
        if router[0] == "sampled":
            writer = next((k for k in range(len(pi)) if u < sum(pi[: k + 1])), len(pi) - 1)
        else:
            writer = favourite if defer else 0
        scores = base_logits
        if writer:
            theirs = (own_prompts or {}).get(writer, prompt)
            logits = run(assistants[writer - 1], theirs + text.tokens).logits[0, -1].tolist()
            logits = (logits + [-math.inf] * len(base_logits))[: len(base_logits)]
            others = {
                name: run(model, prompt + text.tokens).logits[0, -1].tolist()
                for name, model in combiner[1].items()
                if isinstance(model, torch.nn.Module)
            }
            scores = combine(combiner, base_logits, logits, d, others)
        text.raw.append(scores)
        for processor in processors:
            scores = processor(torch.tensor([memory + text.tokens]), torch.tensor([scores]))[0].tolist()
        text.scores.append(scores)
        noisy = [s + gumbel(seed, row, step, v) for v, s in enumerate(scores)] if sample else scores
        token = max(range(len(noisy)), key=lambda v: noisy[v])
        text.tokens.append(token)
        text.source.append(writer)
        text.deferral_probs.append(d)
        if token in eos:
            break
    return text


@torch.no_grad()
def run(model, tokens):
    return model(input_ids=torch.tensor([tokens]), use_cache=False)


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(x - largest) for x in logits]
    return [w / sum(weights) for w in weights]


def decide(router, base_logits, d, ema, threshold, step, u) -> bool:
    name, options = router
    p = sorted(softmax(base_logits), reverse=True)
    progress = min(step / options.get("steps", 32), 1.0)
    never_to_eta = {
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "exponential": math.exp(-5 * progress) if progress < 1 else 0.0,
        "constant": float(progress < 1),
    }[options.get("shape", "linear")]
    return {
        "learned": d > threshold,
        "ema": ema > threshold,
        "scheduled": d > threshold + (1 - threshold) * never_to_eta,
        "random": u < options.get("rate", 0),
        "entropy": -sum(x * math.log(x) for x in p if x > 0) > options.get("cut", 0),
        "top_probability": p[0] < options.get("cut", 0),
        "margin": p[0] - p[1] < options.get("cut", 0),
        "always": True,
        "never": False,
        "sampled": False,
    }[name]


def combine(combiner, base_logits, assistant_logits, d, others) -> list[float]:
    name, options = combiner
    p0, p1 = softmax(base_logits), softmax(assistant_logits)
    vocabulary = range(len(p0))
    if name == "assistant":
        return assistant_logits
    if name == "mixture":
        return [log((1 - d) * p0[v] + d * p1[v]) for v in vocabulary]
    if name == "confident":
        return [log(x) for x in (p0 if max(p0) > max(p1) else p1)]
    if name == "contrastive":
        alpha, beta = options.get("alpha", 0.1), options.get("beta", 0.5)
        return [
            (1 + beta) * log(p1[v]) - beta * log(p0[v]) if p1[v] >= alpha * max(p1) else -math.inf for v in vocabulary
        ]
    assert name == "proxy_tuning"
    untuned = softmax(others["untuned"])
    return [log(p1[v]) + options.get("weight", 1.0) * (log(p0[v]) - log(untuned[v])) for v in vocabulary]


def log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def key(seed: int, row: int, step: int, purpose: int) -> int:
    state = seed
    for part in (row, step, purpose):
        state = mix((state + (part + 1) * 0x9E3779B97F4A7C15) & MASK)
    return state


def uniform(seed: int, row: int, step: int, purpose: int) -> float:
    return ((mix(key(seed, row, step, purpose)) >> 11) + 0.5) / 2**53


def gumbel(seed: int, row: int, step: int, token: int) -> float:
    bits = mix((key(seed, row, step, 2) + (token + 1) * 0x9E3779B97F4A7C15) & MASK)
    return -math.log(-math.log(((bits >> 11) + 0.5) / 2**53))
