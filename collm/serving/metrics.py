"""What `/metrics` shows, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1)


class Metrics:
    """One registry for one application, so that several can live in a process."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.requests = Counter("collm_requests", "HTTP requests answered", ["route", "status"], registry=r)
        self.prompt_tokens = Counter("collm_prompt_tokens", "Tokens of prompts", registry=r)
        self.tokens = Counter("collm_tokens", "Tokens written, by who wrote them", ["source"], registry=r)
        self.deferral_rate = Histogram(
            "collm_deferral_rate", "Share of an answer's tokens that assistants wrote", buckets=SHARES, registry=r
        )
        self.handoff = Histogram(
            "collm_handoff_seconds",
            "From deferral to the assistant's token",
            ["assistant"],
            buckets=SECONDS,
            registry=r,
        )
        self.assistant_errors = Counter("collm_assistant_errors", "Failed hand-offs", ["assistant"], registry=r)
        self.fallbacks = Counter("collm_fallbacks", "Answers that the base finished alone", registry=r)
        self.breaker_open = Gauge("collm_breaker_open", "1 while an assistant is not asked", ["assistant"], registry=r)
        self.running = Gauge("collm_running", "Answers being written", registry=r)
        self.waiting = Gauge("collm_waiting", "Answers in the queue", registry=r)
        self.refused = Counter("collm_refused", "Requests refused because the queue was full", registry=r)
        self.abandoned = Counter("collm_abandoned", "Answers whose client left", registry=r)
        self.queue_time = Histogram("collm_queue_seconds", "Time in the queue", buckets=SECONDS, registry=r)
        self.first_token = Histogram(
            "collm_time_to_first_token_seconds", "From admission to the first token", buckets=SECONDS, registry=r
        )
        self.answer_time = Histogram("collm_answer_seconds", "From admission to the end", buckets=SECONDS, registry=r)
        self.engine_time = Counter(
            "collm_engine_seconds", "Time that answers waited for an engine", ["engine"], registry=r
        )

    def render(self) -> bytes:
        return generate_latest(self.registry)
