"""`PooledCalls`: what an `LLM` does beside generating: embeddings, classes, scores, hidden states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from loraserve.engine.calls import Prompt, as_prompts, per_request
from loraserve.engine.scoring import Scoring
from loraserve.pooling.head import ClassificationHead
from loraserve.pooling.params import PoolingKind, PoolingParams
from loraserve.request import AdapterSpec, GenerateRequest, PoolingOutput


class PooledCalls(ABC):
    """Of prompts that are pooled, in the same batch as everything else.

    Every method raises as `LLM.generate` does, and InvalidRequestError where the adapter or the model can't
    do what is asked.
    """

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        adapter: AdapterSpec | Sequence[AdapterSpec] = None,
        *,
        pooling: PoolingKind | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
        progress: bool | None = None,
        cache_salt: str | None = None,
    ) -> list[PoolingOutput]:
        """A vector of each prompt, `values` float32 [dimensions], in the order of the prompts.

        Args:
            prompts: one prompt or many; a prompt is a string or a list of token ids.
            adapter: for all, or one per prompt: None, a name, or {name: weight}.
            pooling: "last" takes the last token's hidden state, "mean" the mean of all, "cls" the first's;
                None is as the adapter's or the model's files say, else "last".
            normalize: give vectors the length 1.
            dimensions: keep only the first ones, before vectors are normalised.
            progress, cache_salt: as of `LLM.generate`.
        """
        params = PoolingParams(kind=pooling, normalize=normalize, dimensions=dimensions)
        return self._pool_all(prompts, adapter, params, progress, cache_salt)

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        adapter: AdapterSpec | Sequence[AdapterSpec] = None,
        *,
        progress: bool | None = None,
        cache_salt: str | None = None,
    ) -> list[PoolingOutput]:
        """Labels of each prompt, of the head in its adapter's file, or else the model's.

        `values` are the logits, float32 [labels], `probabilities` their softmax, or sigmoids where several
        labels may hold (`problem_type`), or the logit itself of a head with one label; `labels` their names.
        Args as of `embed`.
        """
        return self._pool_all(prompts, adapter, PoolingParams(task="classify"), progress, cache_salt)

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        adapter: AdapterSpec | Sequence[AdapterSpec] = None,
        *,
        normalize: bool = False,
        dimensions: int | None = None,
        progress: bool | None = None,
        cache_salt: str | None = None,
    ) -> list[PoolingOutput]:
        """The hidden state of each token, behind the final norm: `values` float32 [tokens, dimensions].

        Args as of `embed`.
        """
        params = PoolingParams(task="token_embed", normalize=normalize, dimensions=dimensions)
        return self._pool_all(prompts, adapter, params, progress, cache_salt)

    def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        adapter: AdapterSpec = None,
        *,
        pooling: PoolingKind | None = None,
        progress: bool | None = None,
        cache_salt: str | None = None,
    ) -> list[float]:
        """How well each document answers the query in its place, or the only query.

        Where adapter or model have a head of one label, it scores query and document in one prompt; else the
        score is the cosine of their embeddings.

        Args:
            queries: as many as documents, or one.
            documents: one or many.
            adapter: for all: None, a name, or {name: weight}.
            pooling: of embeddings, as of `embed`.
            progress, cache_salt: as of `LLM.generate`.
        """
        head = self._head_of(adapter)
        request = GenerateRequest(adapter=adapter, cache_salt=cache_salt, pooling=PoolingParams(kind=pooling))
        scoring = Scoring.of(_texts(queries), _texts(documents), request, head)
        return scoring.scores([output.pooled for output in self._pool(scoring.requests, progress)])

    def _pool_all(
        self,
        prompts: Prompt | Sequence[Prompt],
        adapter: AdapterSpec | Sequence[AdapterSpec],
        params: PoolingParams,
        progress: bool | None,
        cache_salt: str | None,
    ) -> list[PoolingOutput]:
        prompt_list = as_prompts(prompts)
        adapters = per_request(adapter, len(prompt_list), "adapter")
        requests = [
            GenerateRequest(prompt=prompt, adapter=one, cache_salt=cache_salt, pooling=params)
            for prompt, one in zip(prompt_list, adapters, strict=True)
        ]
        return self._pool(requests, progress)

    @abstractmethod
    def _pool(self, requests: Sequence[GenerateRequest], progress: bool | None) -> list[PoolingOutput]:
        """Run requests with `pooling`; their outputs in order."""

    @abstractmethod
    def _head_of(self, adapter: AdapterSpec) -> ClassificationHead | None:
        """What classifies prompts for this adapter."""


def _texts(texts: Any) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)
