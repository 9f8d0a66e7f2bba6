"""`Scoring`: how well pairs of texts go together: which requests that takes, and what their answers say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from loraserve.errors import InvalidRequestError
from loraserve.pooling.head import ClassificationHead
from loraserve.pooling.params import Pooled, PoolingParams
from loraserve.request import GenerateRequest


@dataclass(frozen=True)
class Scoring:
    """Requests, in order, and which of them are a pair; None where each is a pair by itself."""

    requests: list[GenerateRequest]
    pairs: list[tuple[int, int]] | None

    @staticmethod
    def of(
        queries: Sequence[str],
        documents: Sequence[str],
        request: GenerateRequest,
        head: ClassificationHead | None,
    ) -> Scoring:
        """Score each query with the document in its place, or one query with all documents.

        A head of one label reads the two as one prompt, put together as the tokenizer does with pairs; else
        scores are cosines of embeddings.

        Args:
            queries: as many as documents, or one.
            documents: one or more.
            request: with everything but its prompt and what to make of it.
            head: of the request's adapter or the model.

        Raises:
            InvalidRequestError: their numbers don't fit together.
        """
        if not queries or not documents:
            raise InvalidRequestError(
                f"there are no {'documents' if queries else 'queries'}, give at least one"
            )
        if len(queries) not in (1, len(documents)):
            raise InvalidRequestError(
                f"{len(queries)} queries and {len(documents)} documents are no pairs: give as many of each, "
                "or one query and its documents"
            )
        of_document = [index if len(queries) > 1 else 0 for index in range(len(documents))]
        if head is not None and len(head.labels) == 1:
            pooling = PoolingParams(task="classify")
            request = replace(request, pooling=pooling)
            texts = zip(of_document, documents, strict=True)
            return Scoring(
                [replace(request, prompt=queries[query], prompt_pair=text) for query, text in texts], None
            )
        pooling = request.pooling or PoolingParams()
        requests = [replace(request, prompt=text, pooling=pooling) for text in (*queries, *documents)]
        return Scoring(requests, [(query, len(queries) + index) for index, query in enumerate(of_document)])

    def scores(self, pooled: Sequence[Pooled]) -> list[float]:
        """A score for each pair, in their order: values of float32, cosines in [-1, 1]."""
        if self.pairs is None:
            return [float(_probabilities(one)[0]) for one in pooled]
        vectors = np.stack([one.values for one in pooled]).astype(np.float64)
        lengths = np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)
        cosines = [vectors[a] @ vectors[b] / (lengths[a] * lengths[b]) for a, b in self.pairs]
        return [float(one) for one in np.clip(cosines, -1.0, 1.0).astype(np.float32)]


def _probabilities(pooled: Pooled) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    assert pooled.probabilities is not None, "invariant: a head gave it"
    return pooled.probabilities
