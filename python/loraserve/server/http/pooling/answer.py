"""Answers of the pooling routes, in the shapes of OpenAI, vLLM, Jina and Cohere."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from loraserve.engine.scoring import Scoring
from loraserve.errors import InvalidRequestError
from loraserve.pooling.params import Pooled
from loraserve.request import Completion
from loraserve.server.http.pooling.schema import EncodingFormat
from loraserve.server.request_run import RequestRun

MAX_VALUES = 2**22  # of one answer: some 80 MB as text


@dataclass(frozen=True, kw_only=True)
class PooledHead:
    """What a body begins with; `created` is in Unix seconds."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self) -> dict[str, Any]:
        """Of vLLM's lists."""
        return {"id": self.id, "object": "list", "created": self.created, "model": self.model}


class WholeEmbeddings:
    """OpenAI's list of embeddings."""

    def __init__(self, head: PooledHead, encoding_format: EncodingFormat | None) -> None:
        self._head = head
        self._encoding_format = encoding_format

    def body(self, run: RequestRun, answers: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        vectors = _vectors(answers, self._encoding_format)
        data = [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(vectors)
        ]
        return {"object": "list", "data": data, "model": self._head.model, "usage": _usage(run)}


class WholePooling:
    """vLLM's list of what prompts were pooled to: vectors, matrices or probabilities."""

    def __init__(self, head: PooledHead, encoding_format: EncodingFormat | None) -> None:
        self._head = head
        self._encoding_format = encoding_format

    def body(self, run: RequestRun, answers: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        data = [
            {"index": index, "object": "pooling", "data": values}
            for index, values in enumerate(_vectors(answers, self._encoding_format))
        ]
        return {**self._head.fields(), "data": data, "usage": _usage(run)}


class WholeClasses:
    """vLLM's list of classes."""

    def __init__(self, head: PooledHead, *, wants_logits: bool) -> None:
        self._head = head
        self._wants_logits = wants_logits

    def body(self, run: RequestRun, answers: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        pooled = _pooled(answers)
        _check_num_values([one.values for one in pooled])
        data = [self._entry(index, one) for index, one in enumerate(pooled)]
        return {**self._head.fields(), "data": data, "usage": _usage(run)}

    def _entry(self, index: int, pooled: Pooled) -> dict[str, Any]:
        return {
            "index": index,
            "label": pooled.labels[int(pooled.values.argmax())],
            "probs": pooled.values if self._wants_logits else pooled.probabilities,
            "num_classes": len(pooled.labels),
        }


class WholeScores:
    """vLLM's list of scores."""

    def __init__(self, head: PooledHead, scoring: Scoring) -> None:
        self._head = head
        self._scoring = scoring

    def body(self, run: RequestRun, answers: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        scores = self._scoring.scores(_pooled(answers))
        data = [
            {"index": index, "object": "score", "score": np.float32(score)}
            for index, score in enumerate(scores)
        ]
        return {**self._head.fields(), "data": data, "usage": _usage(run)}


class WholeRanking:
    """Jina's and Cohere's results, the best first; documents only where they are given."""

    def __init__(
        self, head: PooledHead, scoring: Scoring, top_n: int | None, documents: Sequence[str] | None
    ) -> None:
        self._head = head
        self._scoring = scoring
        self._top_n = top_n
        self._documents = documents

    def body(self, run: RequestRun, answers: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        scores = self._scoring.scores(_pooled(answers))
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        results = [self._entry(index, scores[index]) for index in order[: self._top_n or None]]
        usage = _usage(run)
        return {
            "id": self._head.id,
            "model": self._head.model,
            "usage": usage,
            "results": results,
            "meta": {"tokens": {"input_tokens": usage["prompt_tokens"]}},
        }

    def _entry(self, index: int, score: float) -> Mapping[str, Any]:
        entry: dict[str, Any] = {"index": index, "relevance_score": np.float32(score)}
        if self._documents is not None:
            entry["document"] = {"text": self._documents[index]}
        return entry


def _pooled(answers: Sequence[Sequence[Completion]]) -> list[Pooled]:
    found = [answer.pooled for (answer,) in answers]
    assert None not in found, "invariant: an answer that is cut is an error"
    return [one for one in found if one is not None]


def _vectors(
    answers: Sequence[Sequence[Completion]], encoding_format: EncodingFormat | None
) -> list[npt.NDArray[np.float32] | str]:
    """As JSON takes them: arrays, or base64 of float32."""
    arrays = [one.values if one.probabilities is None else one.probabilities for one in _pooled(answers)]
    _check_num_values(arrays)
    if encoding_format != "base64":
        return [np.ascontiguousarray(array) for array in arrays]
    return [base64.b64encode(array.astype("<f4").tobytes()).decode() for array in arrays]


def _check_num_values(arrays: Sequence[npt.NDArray[np.float32]]) -> None:
    num_values = sum(array.size for array in arrays)
    if num_values > MAX_VALUES:
        raise InvalidRequestError(
            f"the answer would have {num_values} numbers, the limit is {MAX_VALUES}: send fewer inputs, or "
            "ask for fewer dimensions"
        )


def _usage(run: RequestRun) -> dict[str, int]:
    num_tokens = run.num_prompt_tokens
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
