"""What the routes of responses answer with, for the OpenAPI document; answers are built without these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from loraserve.server.http.openai.openapi import EVENTS, OpenAIError, Responses


class InputTokensDetails(BaseModel):
    """Tokens of the prompt that came from the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(BaseModel):
    """Tokens of reasoning."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class OutputItem(BaseModel):
    """A message, reasoning, or a function_call, with the fields of its type."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["completed", "incomplete"]


class ResponseObject(BaseModel):
    """Fields of the request beside these. Streamed as events with numbers where `stream` is true."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[OutputItem]
    usage: ResponseUsage
    incomplete_details: dict[str, Any] | None
    previous_response_id: str | None


class DeletedResponse(BaseModel):
    """That it is forgotten."""

    id: str
    object: Literal["response"]
    deleted: bool


class ItemList(BaseModel):
    """A page of items."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokens(BaseModel):
    """Tokens of the prompt."""

    object: Literal["response.input_tokens"]
    input_tokens: int


_ERROR: dict[str, Any] = {"model": OpenAIError}
_LOOKUP: Responses = {status: _ERROR for status in (400, 401, 404, 422)}
_POST: Responses = {status: _ERROR for status in (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 503)}
CREATE_RESPONSES: Responses = {200: {"model": ResponseObject, "content": EVENTS}, **_POST}
COUNT_RESPONSES: Responses = {200: {"model": InputTokens}, **_POST}
GET_RESPONSES: Responses = {200: {"model": ResponseObject}, **_LOOKUP}
DELETE_RESPONSES: Responses = {200: {"model": DeletedResponse}, **_LOOKUP}
ITEMS_RESPONSES: Responses = {200: {"model": ItemList}, **_LOOKUP}
