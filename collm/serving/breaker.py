"""A circuit breaker: after repeated failures nobody waits for an assistant any more, until a single trial succeeds."""

from __future__ import annotations

import time
from collections.abc import Callable


class CircuitBreaker:
    """
    Closed while the assistant answers. After `failures` in a row it opens: `allow` says no. After `cooldown` seconds
    one request is let through; if it fails the breaker stays open for twice as long, up to `longest`.

    Args:
        failures (`int`, *optional*, defaults to 3): failures in a row that open it.
        cooldown, longest (`float`): seconds.
        trial_time (`float`): seconds after which a trial that was never reported counts as gone (its client left).
        clock (`Callable`, *optional*): seconds, monotonic.
    """

    def __init__(
        self,
        failures: int = 3,
        cooldown: float = 5.0,
        longest: float = 60.0,
        trial_time: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.failures, self.cooldown, self.longest, self.trial_time = failures, cooldown, longest, trial_time
        self.clock = clock
        self.count = 0
        self.pause = cooldown
        self.next_trial: float | None = None  # None while closed
        self.on_trial = False

    @property
    def is_open(self) -> bool:
        return self.next_trial is not None

    def allow(self) -> bool:
        """Whether the assistant may be asked now. While open, a yes is the trial: others wait for its outcome."""
        if self.next_trial is None:
            return True
        if self.clock() < self.next_trial:
            return False
        self.on_trial, self.next_trial = True, self.clock() + self.trial_time
        return True

    def success(self) -> None:
        self.count, self.pause, self.next_trial, self.on_trial = 0, self.cooldown, None, False

    def failure(self) -> None:
        self.count += 1
        if self.is_open and not self.on_trial:  # it was asked before the breaker opened
            return
        if self.on_trial:
            self.pause = min(self.pause * 2, self.longest)
        if self.on_trial or self.count >= self.failures:
            self.on_trial, self.next_trial = False, self.clock() + self.pause
