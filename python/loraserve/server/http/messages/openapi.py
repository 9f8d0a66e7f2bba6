"""What Anthropic's routes answer with, for the OpenAPI document; answers are built without these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from loraserve.server.http.openai.openapi import EVENTS, Responses


class AnthropicErrorFields(BaseModel):
    """What went wrong; `details` are for programs, where there are any."""

    type: str
    message: str
    details: dict[str, Any] | None = None


class AnthropicError(BaseModel):
    """The body of every error under /v1/messages."""

    type: Literal["error"]
    error: AnthropicErrorFields


class ContentBlock(BaseModel):
    """Text, thinking (with a signature that means nothing), or a tool_use."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class OutputTokensDetails(BaseModel):
    """Those of the output that are reasoning."""

    thinking_tokens: int


class MessageUsage(BaseModel):
    """Token counts; what came from the prefix cache is not counted as input."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    service_tier: str


class MessageAnswer(BaseModel):
    """Streamed as Anthropic's server-sent events where `stream` is true."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: Literal[
        "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
    ]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(BaseModel):
    """Tokens of the prompt."""

    input_tokens: int


_ERRORS: Responses = {
    status: {"model": AnthropicError} for status in (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 503)
}
MESSAGE_RESPONSES: Responses = {200: {"model": MessageAnswer, "content": EVENTS}, **_ERRORS}
COUNT_RESPONSES: Responses = {200: {"model": TokenCount}, **_ERRORS}
