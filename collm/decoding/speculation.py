"""Speculation: doing work before it is known to be needed, where it costs little and usually is. No token changes by
it.

**Drafting.** While a deferral waits for its assistant, the base's own token stands in and the base drafts on; one
assistant pass then verifies every waiting deferral ([`DraftGate`] decides how far to draft). Drafting on has a price
when a stand-in turns out wrong: what follows it is discarded. Its gain when all are right is one assistant pass less.
With s the probability that all stand-ins are right, a and b the cost of an assistant pass and a base step, and 1 / r
tokens from one deferral to the next, it pays to draft on where

    s (a - b) > (1 - s) b / r        that is        s > 1 / (1 + r (a / b - 1)).

a - b and not a is won, because asking at once gains a base step when all are right: the assistant has then read as far
as the base, and the base reads along what it expects next. b is the cost of a token that the base writes, which is less
than a step where it reads along with success.

**Reading along.** A base step reads one token and costs hardly more for a few. So the base reads, behind the token
that is certain, tokens that are likely to follow ([`ReadAhead`]): what the assistant expects where it has read as far;
else the rest of a discarded draft, or what followed the last few tokens when they occurred before (prompt lookup),
whichever has been right more often. Where the base, or whoever it asks, indeed writes them, their base steps are saved.

Both learn while decoding from what turned out right, and leave the plain loop where nothing is gained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# Share of stand-ins that were right, by the base's probability of the stand-in in tenths (Qwen2.5-Coder 0.5B and 1.5B
# on GSM8K, greedy). The shape counts for SHAPE_WEIGHT observations in each tenth, the level for LEVEL_WEIGHT in all.
PRIOR_ACCEPTANCE = (0.2, 0.25, 0.3, 0.4, 0.55, 0.65, 0.75, 0.8, 0.85, 0.9)
SHAPE_WEIGHT, LEVEL_WEIGHT = 16.0, 8.0
PRIOR_RATE, PRIOR_RATE_WEIGHT = 0.25, 40.0

# Cost of a decoding step: reading the weights, at bytes per second, and an overhead for each layer. Only ratios matter.
BANDWIDTH = {"cpu": 24e9, "cuda": 2e12}
SECONDS_PER_LAYER = 4e-4

MAX_READ_ALONG = 4  # tokens that all rows of a base step read along together
LONGEST_MATCH = 3  # tokens that must have occurred before, at most
WORTH_READING = 0.1  # cost of one more token in a base step
REPLACED, INSERTED = -1, -2  # sources: a discarded draft with the right token instead of the wrong one, or with both


def step_cost(model: Any) -> float:
    """Rough seconds of one forward over a few tokens: a function of the model alone, so that runs can be repeated."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    bandwidth = BANDWIDTH.get(next(model.parameters()).device.type, BANDWIDTH["cuda"])
    return weights / bandwidth + SECONDS_PER_LAYER * model.config.get_text_config().num_hidden_layers


@dataclass
class DraftGate:
    """Estimates acceptance and the deferral rate, and decides whether to draft on.

    The probability that a stand-in is right depends on how sure the base is of it. That curve is learned: every
    deferral tells whether its stand-in was right, drafted on or not.

    Args:
        cost_ratio (`float`): a / b, the cost of an assistant pass in base steps.
    """

    cost_ratio: float
    right: list[int] = field(default_factory=lambda: [0] * len(PRIOR_ACCEPTANCE))
    seen: list[int] = field(default_factory=lambda: [0] * len(PRIOR_ACCEPTANCE))
    deferrals: float = PRIOR_RATE * PRIOR_RATE_WEIGHT
    tokens: float = PRIOR_RATE_WEIGHT
    steps: float = 8.0  # base steps, a few without a saving in front
    saved: float = 0.0  # base steps saved by reading along

    def acceptance(self, probability: float) -> float:
        """Estimated probability that the assistant chooses a stand-in to which the base gives `probability`.

        The prior's curve, moved to the level at which stand-ins have been right so far, then each tenth to its own
        share.
        """
        i = self._bin(probability)
        expected = sum(n * prior for n, prior in zip(self.seen, PRIOR_ACCEPTANCE, strict=True))
        level = (sum(self.right) + LEVEL_WEIGHT) / (expected + LEVEL_WEIGHT)
        prior = min(PRIOR_ACCEPTANCE[i] * level, PRIOR_ACCEPTANCE[-1])
        return (self.right[i] + SHAPE_WEIGHT * prior) / (self.seen[i] + SHAPE_WEIGHT)

    def record(self, probability: float, accepted: bool) -> None:
        """A waiting deferral was verified."""
        i = self._bin(probability)
        self.right[i] += accepted
        self.seen[i] += 1

    def is_open(self, survival: float) -> bool:
        """Whether to draft on when all stand-ins are right with probability `survival`."""
        cost_ratio = self.cost_ratio * (1 + self.saved / self.steps)
        return survival > 1 / (1 + self.deferrals / self.tokens * max(cost_ratio - 1, 0))

    def _bin(self, probability: float) -> int:
        return min(int(probability * len(self.seen)), len(self.seen) - 1)


class Lookup:
    """What followed the last tokens of a row when they occurred before (Saxena, 2023, *Prompt lookup decoding*)."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.text, self.prompt = list(prompt), len(prompt)
        self.synced = self.indexed = 0  # new tokens that `text` agrees with; tokens whose n-grams are in `places`
        self.places: dict[tuple[int, ...], int] = {}
        self.rejected: tuple[int, list[int]] = (0, [])  # new tokens before a wrong stand-in; it and what was behind it

    def cut(self, step: int, tokens: list[int]) -> None:
        """The row's new tokens from `step` on, `tokens`, were wrong."""
        self.rejected = (step, tokens)
        self.synced = min(self.synced, step)
        self.indexed = min(self.indexed, self.prompt + step)

    def after(self, tokens: list[int], guess: list[int], count: int) -> tuple[int, list[int]]:
        """Length of the longest match of the end of `tokens + guess`, and up to `count` tokens that followed it."""
        self.text[self.prompt + self.synced :] = tokens[self.synced :] + guess
        self.synced, text = len(tokens), self.text
        for end in range(self.indexed + 1, self.prompt + len(tokens)):
            for n in range(1, min(LONGEST_MATCH, end) + 1):
                self.places[tuple(text[end - n : end])] = end
        self.indexed = max(self.indexed, self.prompt + len(tokens) - 1)
        for n in range(min(LONGEST_MATCH, len(text) - 1), 0, -1):
            end = self.places.get(tuple(text[-n:]), 0)
            if 0 < end < len(text) and text[end - n : end] == text[-n:]:  # not cut since, nor written over
                return n, text[end : end + count]
        return 0, []

    def resumed(self, tokens: list[int], count: int) -> list[tuple[int, list[int]]]:
        """
        How the discarded draft would go on behind `tokens`, up to `count` tokens, if all that was written since agrees
        with it: with the right token instead of the wrong one, and with both, each with its source.
        """
        step, discarded = self.rejected
        if not step < len(tokens) <= step + len(discarded):
            return []
        agreed, found = tokens[step + 1 :], []
        for source, draft in ((REPLACED, discarded[1:]), (INSERTED, discarded)):
            if draft[: len(agreed)] == agreed and len(draft) > len(agreed):
                found.append((source, draft[len(agreed) : len(agreed) + count]))
        return found


@dataclass
class ReadAhead:
    """Chooses tokens for the base to read along, and learns from which source they are worth it.

    A source is 0 for what an assistant expects, n for a match of n tokens, negative for a discarded draft.
    """

    seen: Counter[int] = field(default_factory=Counter)
    right: Counter[int] = field(default_factory=Counter)

    def budget(self, rows: int) -> int:
        """How many tokens each of so many rows may read along."""
        return MAX_READ_ALONG // rows

    def is_worth(self, source: int) -> bool:
        return self.share(source) > WORTH_READING

    def share(self, source: int) -> float:
        return (self.right[source] + 1) / (self.seen[source] + 2)

    def record(self, source: int, right: bool) -> None:
        """The first token that a source proposed was or was not written."""
        self.seen[source] += 1
        self.right[source] += right

    def propose(self, lookup: Lookup, tokens: list[int], expected: int | None, count: int) -> tuple[int, list[int]]:
        """Source and tokens to read along behind `tokens`; `expected` is what an assistant expects next, if known."""
        guess = [expected] if expected is not None and self.is_worth(0) else []
        n, more = lookup.after(tokens, guess, count - len(guess))
        if guess:
            return 0, guess + more
        found = [*lookup.resumed(tokens, count), *([(n, more)] if more else [])]
        source, more = max(found, key=lambda one: self.share(one[0]), default=(0, []))
        return source, more if self.is_worth(source) else []
