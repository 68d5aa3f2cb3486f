"""The HTTP application: OpenAI-compatible routes over a [`~collm.serving.service.Service`]."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from collm import __version__
from collm.decoding.routers import resolve_router
from collm.engines.collaboration import Request, gate_of
from collm.engines.session import Sampling
from collm.errors import AssistantError, CoLLMError, ConfigurationError

from .metrics import Metrics
from .schema import (
    AnswerRequest,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorResponse,
    Message,
    TokenizeRequest,
    Usage,
)
from .service import Answer, BusyError, Delta, Service, UnknownModelError

logger = logging.getLogger(__name__)

STREAM = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
UNEXPECTED = "the server failed; its log says how"
CLIENT_LEFT = 499  # as in nginx's log; nobody receives it
ANSWER = {"description": "the answer; with `stream`, server-sent events", "content": {"text/event-stream": {}}}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "the request cannot be meant"},
    401: {"model": ErrorResponse, "description": "no API key, or a wrong one"},
    404: {"model": ErrorResponse, "description": "another model"},
    413: {"model": ErrorResponse, "description": "the body is too large"},
    429: {"model": ErrorResponse, "description": "at capacity; see Retry-After"},
    502: {"model": ErrorResponse, "description": "an engine failed"},
}


def create_app(
    service: Service,
    api_keys: Sequence[str] = (),
    max_body_bytes: int = 4 * 2**20,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """
    Args:
        service ([`Service`]): what answers.
        api_keys (`Sequence[str]`, *optional*): any of them opens `/v1`, `/tokenize` and `/detokenize`; none: no check.
        max_body_bytes (`int`): largest request body.
        cors_origins (`Sequence[str]`, *optional*): origins whose browsers may call; none by default.

    Raises:
        ConfigurationError: a blank key, which would let in who sends none.
    """
    check_keys(api_keys)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.health(patience=None)  # learns the limits of assistants behind URLs, where they answer already
        yield
        await service.close()

    app = FastAPI(title="collm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    app.add_middleware(CountRequests, metrics=service.metrics)
    if cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"])
    _add_error_handlers(app, service.metrics)

    def authorised(request: HTTPRequest) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if api_keys and not any(hmac.compare_digest(given, key.encode()) for key in api_keys):
            raise HTTPException(401, "a valid API key is needed", {"WWW-Authenticate": "Bearer"})

    guarded: dict[str, Any] = {"dependencies": [Depends(authorised)], "responses": ERRORS}
    answering = {**guarded, "responses": {**ERRORS, 200: ANSWER}}

    @app.get("/health", responses={503: {"description": "the base engine is down"}})
    async def health() -> JSONResponse:
        state = await service.health()
        return JSON(state, 200 if state["status"] == "ok" else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", dependencies=guarded["dependencies"], responses={401: ERRORS[401]})
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(service)]}

    @app.post("/v1/completions", **answering)
    async def completions(body: CompletionRequest, http: HTTPRequest) -> Response:
        service.check_count(len(body.prompts()) * body.n)
        requests = await asyncio.to_thread(
            lambda: [
                request
                for own in [_own_prompts(service, body)]
                for prompt in body.prompts()
                for request in _answers(service, body, _ids(service, prompt), body.max_tokens, own)
            ]
        )
        return await _respond(service, body, requests, http, CompletionShape(body, service))

    @app.post("/v1/chat/completions", **answering)
    async def chat_completions(body: ChatCompletionRequest, http: HTTPRequest) -> Response:
        service.check_count(body.n)
        prompt = await asyncio.to_thread(_chat_ids, service, body.messages)
        own = await asyncio.to_thread(_own_system_prompts, service, body)
        limit = body.max_completion_tokens or body.max_tokens
        requests = _answers(service, body, prompt, limit, own)
        return await _respond(service, body, requests, http, ChatShape(body, service))

    @app.post("/tokenize", **guarded)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        if body.messages is not None:
            ids = await asyncio.to_thread(_chat_ids, service, body.messages, body.add_generation_prompt)
        else:
            ids = await asyncio.to_thread(
                service.tokenizer.encode, body.prompt, add_special_tokens=body.add_special_tokens
            )
        return {"tokens": ids, "count": len(ids), "max_model_len": service.max_length}

    @app.post("/detokenize", **guarded)
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        _check_ids(service, body.tokens)
        return {"prompt": await asyncio.to_thread(service.tokenizer.decode, body.tokens)}

    return app


def check_keys(api_keys: Sequence[str]) -> None:
    """
    Raises:
        ConfigurationError: a blank key, which would let in who sends none.
    """
    if any(not key.strip() for key in api_keys):
        raise ConfigurationError("an API key is empty, and would let everybody in: is the variable it comes from set?")


# ---------------------------------------------------------------------------------------------- from body to requests


def _answers(
    service: Service, body: AnswerRequest, prompt_ids: list[int], max_tokens: int | None, own: list[list[int]] | None
) -> list[Request]:
    """The `n` answers that a prompt asks for.

    Raises:
        CoLLMError: what the schema cannot know: model, lengths, token ids, router.
    """
    router = resolve_router(body.router)
    threshold = service.threshold_of(body.model, body.threshold, body.deferral_rate, router)
    gate_of(router, threshold, len(service.assistants))
    room = service.max_length - max(len(prompt) for prompt in [prompt_ids, *(own or [])])
    limit = max_tokens or min(room, service.limits.max_tokens or room)
    if service.limits.max_tokens and limit > service.limits.max_tokens:
        raise CoLLMError(f"max_tokens is {limit}; this server writes at most {service.limits.max_tokens}.")
    if limit < 1 or limit > room:
        raise CoLLMError(
            f"the prompt has {len(prompt_ids)} tokens and max_tokens is {limit}; together at most {service.max_length}."
        )
    bias = {int(i): value for i, value in (body.logit_bias or {}).items()}
    _check_ids(service, [*bias, *body.stop_token_ids])
    eos = frozenset() if body.ignore_eos else service.eos_ids
    return [
        Request(
            prompt_ids=prompt_ids,
            max_tokens=limit,
            threshold=threshold,
            router=body.router,
            sampling=Sampling(
                temperature=body.temperature,
                top_p=body.top_p,
                top_k=max(body.top_k, 0),
                min_p=body.min_p,
                seed=None if body.seed is None else body.seed + i,
                repetition_penalty=body.repetition_penalty,
                logit_bias=bias,
            ),
            stop_ids=eos | frozenset(body.stop_token_ids),
            assistant_prompts=own,
            on_assistant_error=body.on_assistant_error or service.on_assistant_error,
            report=body.return_source,
        )
        for i in range(body.n)
    ]


def _ids(service: Service, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        ids = service.tokenizer.encode(prompt)
        if not ids:
            raise CoLLMError("the prompt has no tokens.")
        return ids
    _check_ids(service, prompt)
    return prompt


def _check_ids(service: Service, ids: Sequence[int]) -> None:
    if ids and max(ids) >= service.vocab_size:
        raise CoLLMError(f"token id {max(ids)} is not in the vocabulary, which has {service.vocab_size}.")


def _chat_ids(service: Service, messages: list[Message], generate: bool = True) -> list[int]:
    if not service.tokenizer.chat_template:
        raise CoLLMError("this model has no chat template; use /v1/completions.")
    try:
        return service.tokenizer.apply_chat_template(
            [m.flat() for m in messages], add_generation_prompt=generate, tokenize=True, return_dict=False
        )
    except Exception as error:  # a template is a program of the checkpoint's; whatever it raises is about the messages
        raise CoLLMError(f"the chat template refuses these messages: {error}") from error


def _own_prompts(service: Service, body: CompletionRequest) -> list[list[int]] | None:
    if body.assistant_prompts is None:
        return None
    if len(body.prompts()) > 1:
        raise CoLLMError("assistant_prompts needs a single prompt.")
    _check_count(service, body.assistant_prompts)
    return [_ids(service, prompt) for prompt in body.assistant_prompts]


def _own_system_prompts(service: Service, body: ChatCompletionRequest) -> list[list[int]] | None:
    if body.assistant_system_prompts is None:
        return None
    _check_count(service, body.assistant_system_prompts)
    rest = [m for m in body.messages if m.role != "system"]
    return [
        _chat_ids(service, body.messages if own is None else [Message(role="system", content=own), *rest])
        for own in body.assistant_system_prompts
    ]


def _check_count(service: Service, prompts: Sequence[Any]) -> None:
    if len(prompts) != len(service.assistants):
        raise CoLLMError(f"{len(prompts)} prompts were given for {len(service.assistants)} assistants.")


# ---------------------------------------------------------------------------------------------- from answers to bodies


class CompletionShape:
    """How a completion looks."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: AnswerRequest, service: Service):
        self.body, self.service = body, service
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self, requests: list[Request], answers: list[Answer]) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "logprobs": None,
                "finish_reason": answer.finish,
                **self.text(answer.text),
                **self.ours(answer),
            }
            for i, answer in enumerate(answers)
        ]
        if self.body.return_token_ids:
            for choice, request in zip(choices, requests, strict=True):
                choice["prompt_token_ids"] = request.prompt_ids
        return {**self.head(self.kind), "choices": choices, "usage": usage(requests, answers, self.body.n)}

    def chunk(self, index: int, delta: Delta, first: bool) -> dict[str, Any]:
        choice = {
            "index": index, "logprobs": None, "finish_reason": delta.finish,
            **self.text_delta(delta.text, first), **self.ours(delta),
        }  # fmt: skip
        return {**self.head(self.chunk_kind), "choices": [choice]}

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.body.model}

    def ours(self, part: Answer | Delta) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self.body.return_token_ids or self.body.return_source:
            fields["token_ids"] = part.token_ids
        if self.body.return_source:
            fields |= {"source": part.source, "deferral_probs": part.deferral_probs}
        if part.fallback_from is not None:
            fields["fallback_from"] = part.fallback_from
        return fields

    def text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def text_delta(self, text: str, first: bool) -> dict[str, Any]:
        return {"text": text}


class ChatShape(CompletionShape):
    """How a chat completion looks."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def text_delta(self, text: str, first: bool) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": text} if first else {"content": text}}


def usage(requests: list[Request], answers: list[Answer], n: int) -> dict[str, int]:
    """Tokens of each prompt once, and of every answer."""
    prompt = sum(len(request.prompt_ids) for request in requests[::n])
    completion = sum(len(answer.token_ids) for answer in answers)
    deferred = sum(k > 0 for answer in answers for k in answer.source)
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion, deferred_tokens=deferred
    ).model_dump()


async def _respond(
    service: Service, body: AnswerRequest, requests: list[Request], http: HTTPRequest, shape: CompletionShape
) -> Response:
    service.admit(len(requests))
    streams = [service.answer(r, body.stop or (), body.skip_special_tokens) for r in requests]  # type: ignore[arg-type]
    if body.stream:
        return EventStream(_events(body, requests, streams, shape), lambda: service.leave(len(requests)))
    try:
        answers = await _unless_client_leaves(http, asyncio.ensure_future(_all(streams)))
    finally:
        service.leave(len(requests))
    return Response(status_code=CLIENT_LEFT) if answers is None else JSON(shape.whole(requests, answers))


async def _all(streams: Sequence[AsyncIterator[Delta]]) -> list[Answer]:
    """Every answer; where one fails or we are cancelled, the others are ended too."""
    tasks = [asyncio.create_task(_whole(stream)) for stream in streams]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _whole(stream: AsyncIterator[Delta]) -> Answer:
    answer = Answer()
    async for delta in stream:
        answer.add(delta)
    return answer


async def _unless_client_leaves(http: HTTPRequest, work: asyncio.Future[Any]) -> Any:
    """The result of `work`; None, with the work cancelled, where the client left before."""
    gone = asyncio.create_task(_disconnect(http))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return await work
        return None
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait({work})


async def _disconnect(http: HTTPRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events. `done` is called however it ends, even where the client left before the first event."""

    def __init__(self, events: AsyncGenerator[str, None], done: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers=STREAM)
        self.events, self.done = events, done

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.done()
            await self.events.aclose()


async def _events(
    body: AnswerRequest,
    requests: list[Request],
    streams: list[AsyncIterator[Delta]],
    shape: CompletionShape,
) -> AsyncGenerator[str, None]:
    """Server-sent events of all answers as they come; an error in one ends them all, as a last event."""
    answers = [Answer() for _ in streams]
    queue: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue()

    async def pump(index: int) -> None:
        try:
            async for delta in streams[index]:
                queue.put_nowait((index, delta))
            queue.put_nowait((index, None))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(index)) for index in range(len(streams))]
    try:
        started: set[int] = set()
        open_streams = len(streams)
        while open_streams:
            index, delta = await queue.get()
            if delta is None:
                open_streams -= 1
            elif isinstance(delta, BaseException):
                if isinstance(delta, CoLLMError):
                    yield _event({"error": _error_body(delta, 502)})
                else:
                    logger.error("an answer failed", exc_info=delta)
                    yield _event({"error": _error_body(UNEXPECTED, 500)})
                break
            else:
                answers[index].add(delta)
                yield _event(shape.chunk(index, delta, index not in started))
                started.add(index)
        else:
            if body.stream_options and body.stream_options.include_usage:
                last = {**shape.head(shape.chunk_kind), "choices": [], "usage": usage(requests, answers, body.n)}
                yield _event(last)
        yield "data: [DONE]\n\n"
    finally:
        await _end(tasks)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


def _model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "collm",
        "max_model_len": service.max_length,
        "deferral": {
            "assistants": [engine.name for engine in service.assistants],
            "threshold": service.threshold,
            "calibrated_rates": [row["rate"] for row in service.deferral.calibration],
        },
    }


# ------------------------------------------------------------------------------------------------ errors and middleware


class JSON(JSONResponse):
    """ASCII only: what a client sent and an error quotes need not be encodable otherwise."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


def _error_body(error: Exception | str, status: int, param: str | None = None) -> dict[str, Any]:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 502: "engine_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"message": str(error), "type": kind, "param": param, "code": status}


def _error(error: Exception | str, status: int, param: str | None = None, headers: Any = None) -> JSONResponse:
    return JSON({"error": _error_body(error, status, param)}, status, headers)


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: HTTPRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error(f"{where}: {first['msg']}" if where else first["msg"], 400, where or None)

    @app.exception_handler(CoLLMError)
    async def ours(_: HTTPRequest, error: CoLLMError) -> JSONResponse:
        if isinstance(error, BusyError):
            return _error(error, 429, headers={"Retry-After": str(error.retry_after)})
        if isinstance(error, AssistantError):
            return _error(error, 502)
        return _error(error, 404 if isinstance(error, UnknownModelError) else 400)

    @app.exception_handler(StarletteHTTPException)
    async def http(_: HTTPRequest, error: StarletteHTTPException) -> JSONResponse:
        return _error(error.detail, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)  # starlette raises it again afterwards, so that it is logged
    async def unexpected(request: HTTPRequest, error: Exception) -> JSONResponse:
        metrics.requests.labels(_route(request.scope), "500").inc()  # it is answered outside of `CountRequests`
        return _error(UNEXPECTED, 500)


def _route(scope: Any) -> str:
    return getattr(scope.get("route"), "path", "other")


class BodyLimit:
    """Refuses bodies above `max_bytes`, declared or not, with 413."""

    def __init__(self, app: Any, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.max_bytes:
            return await self._refuse(scope, receive, send)
        seen = 0

        async def counted() -> dict:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_bytes:
                raise HTTPException(413, f"the body may have {self.max_bytes} bytes")
            return message

        await self.app(scope, counted, send)

    async def _refuse(self, scope: dict, receive: Callable, send: Callable) -> None:
        await _error(f"the body may have {self.max_bytes} bytes", 413)(scope, receive, send)


class CountRequests:
    """Counts answers by route and status."""

    def __init__(self, app: Any, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def counted(message: dict) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(_route(scope), str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)
