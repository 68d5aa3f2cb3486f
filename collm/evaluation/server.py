"""A writer behind an OpenAI-compatible server: `collm serve` with any engine, or a single model in vLLM."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from collm.errors import AssistantError, ConfigurationError
from collm.evaluation.generations import Generation
from collm.evaluation.runner import Problem


@dataclass
class ServerWriter:
    """
    Writes through `/completions`. Prompts go as token ids, so that the text is exactly what a local run reads;
    `collm serve` and vLLM take them.

    Args:
        url (`str`): with or without `/v1`.
        tokenizer (`PreTrainedTokenizerBase`): the base's.
        options (`dict`): arguments of `generate` that requests have: `threshold` or `deferral_rate`, `router`,
            `temperature`, `top_p`.
        max_new_tokens (`int`): length limit.
        seed (`int`): of sampling; every problem has its own.
        timeout (`float`, *optional*, defaults to 600): seconds for one answer.

    Raises:
        [`ConfigurationError`]: a combiner other than "assistant": servers do not blend distributions.
        [`AssistantError`]: the server cannot be reached, refuses a request, or answers without token ids.
    """

    url: str
    tokenizer: Any
    options: dict[str, Any]
    max_new_tokens: int
    seed: int = 0
    timeout: float = 600.0
    model: str = field(init=False)

    def __post_init__(self) -> None:
        import httpx

        if self.options.get("combiner") not in (None, "assistant"):
            raise ConfigurationError("combiners need whole distributions, which a server keeps: leave --server out")
        root = self.url.rstrip("/")
        self._client = httpx.Client(base_url=root if root.endswith("/v1") else f"{root}/v1", timeout=self.timeout)
        self.model = self._request("GET", "/models")["data"][0]["id"]

    def close(self) -> None:
        """Ends the connections."""
        self._client.close()

    def write(self, problems: Sequence[Problem], at_once: int) -> Generator[list[Generation], None, None]:
        """Answers as they come, `at_once` requests being on their way."""
        with ThreadPoolExecutor(at_once) as pool:
            asked = {pool.submit(self._ask, problem): problem for problem in problems}
            started = time.perf_counter()
            try:
                for answer in as_completed(asked):
                    seconds = round(time.perf_counter() - started, 4)
                    started = time.perf_counter()
                    yield [self._generation(asked[answer], answer.result(), seconds)]
            finally:
                pool.shutdown(cancel_futures=True)

    def _ask(self, problem: Problem) -> dict[str, Any]:
        names = ("threshold", "deferral_rate", "router", "temperature", "top_p")
        body = {name: self.options[name] for name in names if name in self.options}
        body = {"temperature": 0.0, **body, "model": self.model, "prompt": problem.prompt_ids}
        body |= {"max_tokens": self.max_new_tokens, "seed": self.seed + problem.id}
        body |= {"return_token_ids": True, "return_source": True}
        return self._request("POST", "/completions", json=body)["choices"][0]

    def _generation(self, problem: Problem, choice: dict[str, Any], seconds: float) -> Generation:
        ids = choice.get("token_ids")
        if ids is None:
            raise AssistantError(f"the server {self.url} answers without token_ids: `collm serve` and vLLM give them")
        source = choice.get("source") or [0] * len(ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        truncated = choice["finish_reason"] == "length"
        return Generation(problem.id, text, ids, source, choice.get("deferral_probs") or [], truncated, seconds)

    def _request(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        import httpx

        try:
            response = self._client.request(method, path, **arguments)
        except httpx.HTTPError as error:
            raise AssistantError(f"the server {self.url} does not answer: {error}") from error
        if response.is_error:
            raise AssistantError(
                f"the server {self.url} refuses {path} ({response.status_code}): {response.text[:500]}"
            )
        return response.json()
