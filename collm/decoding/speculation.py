"""How far to draft: the base writes past a token that it would defer as long as that is likely to pay.

While a deferral waits for its assistant, the base's own token stands in and the base drafts on. One assistant pass then
verifies every waiting deferral. Drafting on has a price when a stand-in turns out wrong (what follows it is discarded) and a
gain when all are right (one assistant pass less). With s the probability that all stand-ins are right, a and b the cost of
an assistant pass and a base step, and 1 / r base steps from one deferral to the next, drafting on pays where

    s a > (1 - s) b / r        that is        s > 1 / (1 + r a / b).

s is the product over waiting deferrals of the probability that the assistant would choose the stand-in too, which depends on
how sure the base is of it. That curve is learned while decoding: every deferral tells whether its stand-in was right, drafted
on or not. If stand-ins are never right, the gate closes and what remains is the plain loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Share of stand-ins that were right, by the base's probability of the stand-in in tenths: a prior that counts for PRIOR_WEIGHT
# observations (Qwen2.5-Coder 0.5B and 1.5B on GSM8K, greedy; benchmarks/decoding/results/speculation.json).
PRIOR_ACCEPTANCE = (0.15, 0.25, 0.35, 0.45, 0.55, 0.62, 0.70, 0.77, 0.85, 0.92)
PRIOR_WEIGHT = 8.0
PRIOR_RATE, PRIOR_RATE_WEIGHT = 0.25, 40.0


@dataclass
class DraftGate:
    """Estimates acceptance and the deferral rate, and decides whether to draft on. Its decisions never change a token.

    Args:
        cost_ratio (`float`): a / b, the cost of an assistant pass in base steps; where decoding is bound by memory, the ratio
            of the bytes of the two models.
    """

    cost_ratio: float
    right: list[float] = field(default_factory=lambda: [PRIOR_WEIGHT * p for p in PRIOR_ACCEPTANCE])
    seen: list[float] = field(default_factory=lambda: [PRIOR_WEIGHT] * len(PRIOR_ACCEPTANCE))
    deferrals: float = PRIOR_RATE * PRIOR_RATE_WEIGHT
    tokens: float = PRIOR_RATE_WEIGHT

    def acceptance(self, probability: float) -> float:
        """Estimated probability that the assistant chooses a stand-in to which the base gives `probability`."""
        i = self._bin(probability)
        return self.right[i] / self.seen[i]

    def record(self, probability: float, accepted: bool) -> None:
        """A waiting deferral was verified."""
        i = self._bin(probability)
        self.right[i] += accepted
        self.seen[i] += 1

    def is_open(self, survival: float) -> bool:
        """Whether to draft on when all stand-ins are right with probability `survival`."""
        return survival > 1 / (1 + self.cost_ratio * self.deferrals / self.tokens)

    def _bin(self, probability: float) -> int:
        return min(int(probability * len(self.seen)), len(self.seen) - 1)
