"""What TGI's routes answer with, for the OpenAPI document; answers themselves are built without these."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel

from loraserve.server.http.openai.openapi import EVENTS, Answer, Responses

Finish: TypeAlias = Literal["length", "eos_token", "stop_sequence"]


class TgiError(BaseModel):
    """The body of every error outside /v1; `error_type` is for programs."""

    error: str
    error_type: str


class PrefillToken(BaseModel):
    """A token of the prompt; its log-probability is not computed."""

    id: int
    text: str
    logprob: float | None


class TokenFields(BaseModel):
    """A token with its natural-log probability; `special` ones are no part of the answer's text."""

    id: int
    text: str
    logprob: float
    special: bool


class BestOfSequence(BaseModel):
    """An answer that `best_of` made and that was not the likeliest."""

    generated_text: str
    finish_reason: Finish
    prompt_tokens: int
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[TokenFields]
    top_tokens: list[list[TokenFields]] | None = None


class GenerateDetails(BaseModel):
    """Of the answer sent, where `details` is true. `seed` is null for a greedy one."""

    finish_reason: Finish
    prompt_tokens: int
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[TokenFields]
    top_tokens: list[list[TokenFields]] | None = None
    best_of_sequences: list[BestOfSequence] | None = None


class GenerateResponse(BaseModel):
    """The likeliest answer, after the prompt where `return_full_text` is true."""

    generated_text: str
    details: GenerateDetails | None = None


class TokenizedToken(BaseModel):
    """A token and the characters, `start` to `stop`, that it stands for."""

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
