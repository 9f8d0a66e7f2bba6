"""Bodies of the pooling routes as they arrive; ranges that the engine checks itself are left to it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from loraserve.server.access.request_limits import MAX_INPUTS
from loraserve.server.http.adapter_selectors import AdapterSelectors
from loraserve.server.http.foreign_fields import (
    POOLING_ELSEWHERE,
    POOLING_NEUTRAL,
    POOLING_NO_EFFECT,
    SELECTORS_ELSEWHERE,
)
from loraserve.server.http.openai.schema import TokenIds, TruncatePromptTokens
from loraserve.server.http.request_body import Elsewhere, Neutral, NoEffect, RequestBody, Text
from loraserve.server.http.user import UserFields

Inputs: TypeAlias = (
    Text
    | TokenIds
    | Annotated[list[TokenIds], Field(fail_fast=True)]
    | Annotated[list[Text], Field(fail_fast=True)]
)
Texts: TypeAlias = Text | Annotated[list[Text], Field(fail_fast=True)]
EncodingFormat: TypeAlias = Literal["float", "base64"]


class PooledBody(AdapterSelectors, UserFields):
    """What all these routes share."""

    no_effect: ClassVar[NoEffect] = POOLING_NO_EFFECT
    neutral: ClassVar[Neutral] = POOLING_NEUTRAL
    elsewhere: ClassVar[Elsewhere] = SELECTORS_ELSEWHERE | POOLING_ELSEWHERE

    model: str | None = Field(
        default=None,
        max_length=1024,
        description="The base model, an adapter, or base:adapter; none is the base model.",
    )
    truncate_prompt_tokens: TruncatePromptTokens | None = Field(
        default=None, description="Keep the last tokens only; -1 keeps as many as fit."
    )
    cache_salt: str | None = Field(
        default=None,
        description="1 to 256 characters: only requests of the same salt (and key) share cached prompts.",
    )


class VectorBody(PooledBody):
    """Of vectors."""

    input: Inputs = Field(description=f"One text, up to {MAX_INPUTS}, or as many lists of token ids.")
    encoding_format: EncodingFormat | None = Field(
        default=None, description="base64 is of float32, little-endian."
    )
    dimensions: int | None = Field(default=None, description="Keep the first ones, then normalise.")
    normalize: bool | None = None


class EmbeddingsBody(VectorBody):
    """POST /v1/embeddings."""

    pooling: Literal["last", "mean", "cls"] | None = Field(
        default=None, description="Which hidden state; none is as the adapter or the model says."
    )


class PoolingBody(VectorBody):
    """POST /pooling."""

    pooling: Literal["last", "mean", "cls"] | None = None
    task: Literal["embed", "classify", "token_embed"] | None = Field(
        default=None, description="None is token_embed: the hidden state of every token."
    )


class ClassifyBody(PooledBody):
    """POST /classify."""

    input: Inputs = Field(description=f"One text, up to {MAX_INPUTS}, or as many lists of token ids.")
    use_activation: bool | None = Field(
        default=None, description="False gives logits in place of probabilities."
    )


class ScoreBody(PooledBody):
    """POST /score; one of each pair of names."""

    text_1: Texts | None = Field(default=None, description="One query, or one for each document.")
    text_2: Texts | None = Field(default=None, description="One document or many.")
    queries: Texts | None = Field(default=None, description="The same as text_1.")
    documents: Texts | None = Field(default=None, description="The same as text_2.")
    pooling: Literal["last", "mean", "cls"] | None = Field(default=None, description="Of embeddings.")


class RerankDocument(RequestBody):
    """A document as an object."""

    no_effect: ClassVar[NoEffect] = frozenset({"id", "title", "metadata"})

    text: Text


class RerankBody(PooledBody):
    """POST /rerank."""

    no_effect: ClassVar[NoEffect] = POOLING_NO_EFFECT | {"max_chunks_per_doc"}  # a document is one chunk
    neutral: ClassVar[Neutral] = POOLING_NEUTRAL | {
        "rank_fields": (["text"],),
        "truncation": (True, False),  # a text that does not fit is refused
        "return_embeddings": (False,),
    }
    elsewhere: ClassVar[Elsewhere] = PooledBody.elsewhere | {
        "texts": "documents",
        "inputs": "documents",
        "input": "documents",
        "text": "query",
    }

    query: Text
    documents: Annotated[list[Text | RerankDocument], Field(min_length=1)]
    top_n: int | None = Field(default=None, ge=0, description="Most results; none or 0 is all.")
    return_documents: bool | None = Field(
        default=None, description="Whether results have their documents; not at /v2 unless it is set."
    )
    max_tokens_per_doc: int | None = Field(
        default=None, ge=1, description="Taken where it cuts no document, or as Cohere's default, 4096."
    )
    pooling: Literal["last", "mean", "cls"] | None = Field(default=None, description="Of embeddings.")


def inputs_of(value: Any) -> list[str | list[int]]:
    """Texts or lists of token ids, one or many."""
    if isinstance(value, str) or (value and isinstance(value[0], int)):
        return [value]
    return list(value)
