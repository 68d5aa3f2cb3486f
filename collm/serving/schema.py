"""Requests as clients send them, validated; the OpenAI API plus what deferral adds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_STOPS = 16

TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]


class StreamOptions(BaseModel):
    """`include_usage`: a last chunk with the usage and no choice."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ResponseFormat(BaseModel):
    """Only plain text: a grammar would have to bind two models."""

    type: Literal["text"] = "text"


class AnswerRequest(BaseModel):
    """What completions and chat completions share."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str = Field(
        min_length=1, max_length=1024, description="served name; `name@0.6` and `name@rate=0.2` set the threshold"
    )
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31 - 1, description="0 and -1 keep all tokens")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[Text] | None = Field(None, description="strings that end an answer and are not part of it")
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=64)
    ignore_eos: bool = False
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    # deferral
    threshold: float | None = Field(None, ge=-1, le=1, description="an assistant writes where d_t > threshold")
    deferral_rate: float | None = Field(None, ge=0, le=1, description="needs a calibrated checkpoint")
    router: str | dict[str, Any] | None = Field(
        None, description='"learned", "entropy:cut=1.2", "random:rate=0.2", ...'
    )
    on_assistant_error: Literal["error", "fallback"] | None = Field(None, description="default: the server's")
    return_source: bool = Field(False, description="adds token_ids, source and deferral_probs to each choice")
    return_token_ids: bool = Field(False, description="adds token_ids and prompt_token_ids, as vLLM does")

    # of the OpenAI API, accepted where they ask for nothing
    presence_penalty: float | None = Field(None, ge=0, le=0, description="not supported: must be 0")
    frequency_penalty: float | None = Field(None, ge=0, le=0, description="not supported: must be 0")

    @field_validator("stop")
    @classmethod
    def _stop_is_short(cls, stop: str | list[str] | None) -> list[str]:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MAX_STOPS or any(len(s) > 1024 for s in stops):
            raise ValueError(f"at most {MAX_STOPS} stop strings of at most 1024 characters")
        return [s for s in stops if s]

    @field_validator("logit_bias")
    @classmethod
    def _bias_is_by_token_id(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or {}:
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise ValueError(f"keys are token ids; got {key[:20]!r}")
        return bias

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, body: Any) -> Any:
        """The OpenAI API takes null for what is not said."""
        if not isinstance(body, dict):
            return body
        return {
            name: value for name, value in body.items() if value is not None or name in ("model", "prompt", "messages")
        }

    @model_validator(mode="after")
    def _one_threshold(self) -> AnswerRequest:
        if self.threshold is not None and self.deferral_rate is not None:
            raise ValueError("threshold and deferral_rate exclude each other")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self


class CompletionRequest(AnswerRequest):
    """`POST /v1/completions`."""

    prompt: Text | TokenIds | Annotated[list[Text | TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: int = Field(16, ge=1, le=2**31 - 1)
    assistant_prompts: list[Text | TokenIds] | None = Field(None, description="a prompt of its own for each assistant")
    echo: Literal[False] = Field(False, description="not supported")
    logprobs: None = Field(None, description="not supported")
    suffix: None = Field(None, description="not supported")
    best_of: Literal[1] | None = Field(None, description="not supported: must be 1")

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each text or token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class ContentPart(BaseModel):
    """Text; images and audio are not supported."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. Fields beyond role and content are handed to the chat template."""

    model_config = ConfigDict(extra="allow")

    role: str = Field(min_length=1, max_length=64)
    content: str | list[ContentPart] | None = None

    def flat(self) -> dict[str, Any]:
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": content or ""}


class ChatCompletionRequest(AnswerRequest):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    assistant_system_prompts: list[str | None] | None = Field(
        None, description="a system prompt of its own for each assistant, in place of the conversation's"
    )
    logprobs: Literal[False] | None = Field(None, description="not supported")
    top_logprobs: None = Field(None, description="not supported")
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="not supported")
    tool_choice: Literal["none"] | None = Field(None, description="not supported")
    response_format: ResponseFormat | None = None


class TokenizeRequest(BaseModel):
    """`POST /tokenize`: text, or a conversation through the chat template."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of both")
        return self


class DetokenizeRequest(BaseModel):
    """`POST /detokenize`."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    tokens: list[TokenId]


class Usage(BaseModel):
    """Token counts; `deferred_tokens` of the completion were written by assistants."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    deferred_tokens: int


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: int | str | None = None


class ErrorResponse(BaseModel):
    """The OpenAI API's shape of an error."""

    error: ErrorBody
