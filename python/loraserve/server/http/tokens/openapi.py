"""What /tokenize and /detokenize answer with, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from loraserve.server.http.openai.openapi import Responses
from loraserve.server.http.tgi.openapi import TgiError, TokenizedToken


class Tokenized(BaseModel):
    """Token ids; `token_strs` are their names in the vocabulary, where they were asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    """The text of tokens, special ones by their names."""

    prompt: str


_ERROR: dict[str, Any] = {"model": TgiError}
_ERRORS: Responses = {status: _ERROR for status in (400, 401, 403, 404, 408, 413, 415, 422, 424, 429, 503)}
TOKENIZE_RESPONSES: Responses = {200: {"model": list[TokenizedToken] | Tokenized}, **_ERRORS}
DETOKENIZE_RESPONSES: Responses = {200: {"model": Detokenized}, **_ERRORS}
