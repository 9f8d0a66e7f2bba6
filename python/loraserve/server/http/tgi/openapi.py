"""What TGI's routes answer with, for the OpenAPI document; answers themselves are built without these."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel

from loraserve.server.http.openai.openapi import EVENTS, Answer, Responses

Finish: TypeAlias = Literal["length", "eos_token", "stop_sequence"]


class TgiError(BaseModel):
    error: str
    error_type: str


class PrefillToken(BaseModel):
    id: int
    text: str
    logprob: float | None


class TokenFields(BaseModel):
    id: int
    text: str
    logprob: float
    special: bool


class BestOfSequence(BaseModel):
    generated_text: str
    finish_reason: Finish
    prompt_tokens: int
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[TokenFields]
    top_tokens: list[list[TokenFields]] | None = None


class GenerateDetails(BaseModel):
    finish_reason: Finish
    prompt_tokens: int
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[TokenFields]
    top_tokens: list[list[TokenFields]] | None = None
    best_of_sequences: list[BestOfSequence] | None = None


class GenerateResponse(BaseModel):
    generated_text: str
    details: GenerateDetails | None = None


class TokenizedToken(BaseModel):
    id: int
    text: str
    start: int
    stop: int


_ERROR: dict[str, Any] = {"model": TgiError}
_ERRORS: Responses = {status: _ERROR for status in (400, 401, 403, 408, 413, 415, 422, 424, 429, 503)}
GENERATE_RESPONSES: Responses = {200: {"model": GenerateResponse}, **_ERRORS}
STREAM_RESPONSES: Responses = {200: {"content": EVENTS}, **_ERRORS}
COMPAT_RESPONSES: Responses = {200: {"model": list[GenerateResponse], "content": EVENTS}, **_ERRORS}
INVOCATION_RESPONSES: Responses = {
    200: {"model": list[GenerateResponse] | Answer, "content": EVENTS},
    404: _ERROR,
    **_ERRORS,
}
TOKENIZE_RESPONSES: Responses = {200: {"model": list[TokenizedToken]}, **_ERRORS}
