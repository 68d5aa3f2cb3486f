"""An assistant behind somebody else's server: any OpenAI-compatible `/v1/completions`, asked for one token at a time.

A server has no sessions, so each question carries the whole text; its prefix cache spares it most of that (vLLM has one
by default). Tokens travel as ids where the server understands that (vLLM, `collm serve`, SGLang); else as text, which
is tokenised here again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import httpx

from collm.errors import AssistantError, AssistantRefusal

from .session import Gate, Piece, Sampling, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RETRIED_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
REFUSALS = {400, 413, 422}  # about the request, not about the server
FIRST_PAUSE = 0.1  # seconds before the first retry; doubles
PART_OF_CHARACTER = "\ufffd"  # what a token decodes to whose bytes are not a whole character


class HTTPEngine:
    """An assistant over HTTP.

    Args:
        url (`str`): address of the server, with or without `/v1`.
        tokenizer (`PreTrainedTokenizerBase`): the base's, which the assistant shares.
        model (`str`, *optional*): the server's name of the model; its first one by default.
        api_key (`str`, *optional*): sent as a bearer token.
        name (`str`, *optional*): for logs and metrics; by default the URL, without a user and password in it.
        token_ids (`bool`, *optional*, defaults to `True`): whether the server takes and returns token ids.
        timeout (`float`, *optional*, defaults to 30.0): seconds for one attempt.
        retries (`int`, *optional*, defaults to 2): further attempts after a lost connection, 429 or 5xx.
        max_length (`int`, *optional*): longest sequence; what the server's `/v1/models` says by default.
        connections (`int`, *optional*, defaults to 256): connections that are kept and reused.
    """

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        model: str | None = None,
        api_key: str | None = None,
        name: str | None = None,
        token_ids: bool = True,
        timeout: float = 30.0,
        retries: int = 2,
        max_length: int | None = None,
        connections: int = 256,
    ):
        root = url.rstrip("/")
        self.url = root if root.endswith("/v1") else root + "/v1"
        self.name = name or str(httpx.URL(root).copy_with(userinfo=b""))
        self.model = model
        self.tokenizer = tokenizer
        self.token_ids = token_ids
        self.retries = retries
        self.max_length = max_length or 2**31
        self.vocab_size = len(tokenizer)
        # Where the tokenizer begins every text with BOS, so does the server's: the text that it is sent has none.
        bos = [tokenizer.bos_token_id]
        self.server_adds = bos if not token_ids and tokenizer.encode("")[:1] == bos else None
        self.client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=timeout,
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    def open(self, prompt_ids: Sequence[int], sampling: Sampling) -> HTTPSession:
        return HTTPSession(self, list(prompt_ids), sampling)

    async def healthy(self) -> bool:
        """Whether the server answers; the name and the length limit of its model are learnt on the way."""
        try:
            await self._learn()
        except AssistantError:
            return False
        return True

    async def close(self) -> None:
        await self.client.aclose()

    async def model_name(self) -> str:
        """The configured name, or the server's first model."""
        return self.model or await self._learn()

    async def _learn(self) -> str:
        models = (await self._send("GET", "/models", retries=0)).get("data") or []
        ours: dict[str, Any] = next((m for m in models if self.model in (None, m.get("id"))), {})
        if not isinstance(ours.get("id"), str):
            raise AssistantError(f"{self.name} does not list {self.model or 'any model'}.")
        self.model = ours["id"]
        self.max_length = min(self.max_length, ours.get("max_model_len") or self.max_length)
        return ours["id"]

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The first choice of a completion.

        Raises:
            AssistantRefusal: the server does not take this request.
            AssistantError: no answer after all attempts, or an answer of another shape.
        """
        answer = await self._send("POST", "/completions", {"model": await self.model_name(), **body})
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise AssistantError(f"{self.name} answered without choices.")
        return choices[0]

    async def _send(
        self, method: str, path: str, body: dict[str, Any] | None = None, retries: int | None = None
    ) -> dict[str, Any]:
        retries = self.retries if retries is None else retries
        for attempt in range(retries + 1):
            try:
                response = await self.client.request(method, self.url + path, json=body)
                if response.is_success:
                    answer = response.json()
                    if not isinstance(answer, dict):
                        raise AssistantError(f"{self.name} answered {path} with something that is not an object.")
                    return answer
                status = response.status_code
                problem = f"status {status}: {response.text[:300]}"
                if status in REFUSALS:
                    raise AssistantRefusal(f"{self.name} refuses: {problem}")
                if status not in RETRIED_STATUS:
                    break
            except AssistantError:  # a ValueError too
                raise
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__} {error}".strip()
            except ValueError as error:
                raise AssistantError(f"{self.name} answered with invalid JSON: {error}") from error
            if attempt < retries:
                await asyncio.sleep(FIRST_PAUSE * 2**attempt * random.uniform(0.5, 1.5))
        raise AssistantError(f"{self.name} gave no answer: {problem}")


class HTTPSession(Tokens):
    """The text so far; the server keeps nothing."""

    def __init__(self, engine: HTTPEngine, prompt_ids: list[int], sampling: Sampling):
        self._engine = engine
        super().__init__(prompt_ids)
        self._sampling = sampling

    async def decode(
        self, max_tokens: int, stop_ids: frozenset[int] = frozenset(), gate: Gate | None = None, report: bool = False
    ) -> AsyncIterator[Piece]:
        if gate is not None or report:
            raise AssistantError("a server over HTTP can be an assistant, not the base: it has no deferral head.")
        for left in range(max_tokens, 0, -1):
            token = await self._next_token()
            self._tokens.append(token)
            finish = "stop" if token in stop_ids else "length" if left == 1 else None
            yield Piece([token], finish=finish)  # type: ignore[arg-type]
            if finish:
                return

    async def close(self) -> None:
        """Nothing to free: the server keeps no session."""

    async def _next_token(self) -> int:
        s, engine = self._sampling, self._engine
        body: dict[str, Any] = {"max_tokens": 1, "temperature": s.temperature, "top_p": s.top_p}
        if (seed := s.seed_at(len(self._tokens))) is not None:
            body["seed"] = seed
        if s.logit_bias:
            body["logit_bias"] = {str(i): bias for i, bias in s.logit_bias.items()}
        if not engine.token_ids:
            return self._tokenised(await engine.complete({**body, "prompt": self._text()}))
        optional = {"top_k": s.top_k, "min_p": s.min_p, "repetition_penalty": s.repetition_penalty}
        body |= {k: v for k, v in optional.items() if v != getattr(Sampling, k)}
        choice = await engine.complete({**body, "prompt": self._tokens, "return_token_ids": True})
        tokens = choice.get("token_ids")
        if not isinstance(tokens, list) or len(tokens) != 1 or type(tokens[0]) is not int:
            raise AssistantError(
                f"{engine.name} was asked for one token id and returned token_ids={tokens!r}; exchange "
                "text with it, if it knows no token ids."
            )
        return tokens[0]

    def _text(self) -> str:
        begins = self._tokens[:1] == self._engine.server_adds
        text = self._engine.tokenizer.decode(self._tokens[begins:])
        if text.endswith(PART_OF_CHARACTER):
            raise AssistantRefusal(f"the text for {self._engine.name} ends within a character: exchange token ids.")
        return text

    def _tokenised(self, choice: dict[str, Any]) -> int:
        tokenizer, text = self._engine.tokenizer, choice.get("text")
        if not isinstance(text, str):
            raise AssistantError(f"{self._engine.name} answered without text.")
        if not text and choice.get("finish_reason") == "stop":
            return int(tokenizer.eos_token_id)
        if PART_OF_CHARACTER in text:
            raise AssistantRefusal(f"{self._engine.name} wrote a part of a character: exchange token ids with it.")
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise AssistantRefusal(
                f"{self._engine.name} wrote {text!r}, which is {len(ids)} tokens of the base, not one."
            )
        return ids[0]
