"""What both clients do beside generating: embeddings, classes and scores, blocking and on asyncio."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from loraserve.pooling.params import Pooled
from loraserve.request import AdapterSpec
from loraserve.wire.pooling import (
    Prompt,
    classes_from_wire,
    classify_request,
    embed_request,
    embeddings_from_wire,
    score_request,
)

Pooling: TypeAlias = Literal["last", "mean", "cls", "every"]


class PooledCalls(ABC):
    """Of a blocking client."""

    _stub: Any

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        adapter: AdapterSpec = None,
        *,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        deadline_s: float | None = None,
        truncate: int | None = None,
        cache_salt: str | None = None,
        user: str | None = None,
    ) -> list[Pooled]:
        """A vector of each prompt, float32 [dimensions]; of each of its tokens where pooling is "every".

        Args:
            prompts: one prompt or up to 2,048; a prompt is a string or a list of token ids.
            adapter: of all prompts.
            pooling: "last" takes the last token's hidden state, "mean" the mean of all, "cls" the first's;
                None is as files of the adapter or the model say, else "last".
            normalize: give vectors the length 1; None does so unless pooling is "every".
            dimensions: keep only the first ones, before vectors are normalised.
            deadline_s, truncate, cache_salt, user: as of `stream`.
        """
        options = _options(deadline_s, truncate, cache_salt, user)
        request = embed_request(prompts, adapter, pooling, normalize, dimensions, options)
        return embeddings_from_wire(self._call(self._stub.Embed, request), every=pooling == "every")

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        adapter: AdapterSpec = None,
        *,
        deadline_s: float | None = None,
        truncate: int | None = None,
        cache_salt: str | None = None,
        user: str | None = None,
    ) -> list[Pooled]:
        """Logits (`values`), probabilities and labels of each prompt; args as of `embed`."""
        options = _options(deadline_s, truncate, cache_salt, user)
        return classes_from_wire(self._call(self._stub.Classify, classify_request(prompts, adapter, options)))

    def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        adapter: AdapterSpec = None,
        *,
        pooling: Literal["last", "mean", "cls"] | None = None,
        deadline_s: float | None = None,
        truncate: int | None = None,
        cache_salt: str | None = None,
        user: str | None = None,
    ) -> list[float]:
        """How well each document answers the query in its place, or the only one; see `LLM.score`."""
        options = _options(deadline_s, truncate, cache_salt, user)
        request = score_request(queries, documents, adapter, pooling, options)
        return list(self._call(self._stub.Score, request).scores)

    @abstractmethod
    def _call(self, method: Any, request: Any) -> Any:
        """The server's answer, or its typed error."""


class AsyncPooledCalls(ABC):
    """Of an asyncio client."""

    _stub: Any

    async def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        adapter: AdapterSpec = None,
        *,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        deadline_s: float | None = None,
        truncate: int | None = None,
        cache_salt: str | None = None,
        user: str | None = None,
    ) -> list[Pooled]:
        """As `Client.embed`."""
        options = _options(deadline_s, truncate, cache_salt, user)
        request = embed_request(prompts, adapter, pooling, normalize, dimensions, options)
        response = await self._call(self._stub.Embed, request)
        return embeddings_from_wire(response, every=pooling == "every")

    async def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        adapter: AdapterSpec = None,
        *,
        deadline_s: float | None = None,
        truncate: int | None = None,
        cache_salt: str | None = None,
        user: str | None = None,
    ) -> list[Pooled]:
        """As `Client.classify`."""
        options = _options(deadline_s, truncate, cache_salt, user)
        response = await self._call(self._stub.Classify, classify_request(prompts, adapter, options))
        return classes_from_wire(response)

    async def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        adapter: AdapterSpec = None,
        *,
        pooling: Literal["last", "mean", "cls"] | None = None,
        deadline_s: float | None = None,
        truncate: int | None = None,
        cache_salt: str | None = None,
        user: str | None = None,
    ) -> list[float]:
        """As `Client.score`."""
        options = _options(deadline_s, truncate, cache_salt, user)
        request = score_request(queries, documents, adapter, pooling, options)
        return list((await self._call(self._stub.Score, request)).scores)

    @abstractmethod
    async def _call(self, method: Any, request: Any) -> Any:
        """The server's answer, or its typed error."""


def _options(
    deadline_s: float | None, truncate: int | None, cache_salt: str | None, user: str | None
) -> dict[str, Any]:
    return {"deadline_s": deadline_s, "truncate": truncate, "cache_salt": cache_salt, "user": user}
