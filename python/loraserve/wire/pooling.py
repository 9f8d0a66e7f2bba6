"""Translates what is pooled between the engine's values and the messages of proto/loraserve/v1, both ways."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np

from loraserve.errors import InvalidRequestError
from loraserve.pooling.params import Pooled, PoolingKind, PoolingParams
from loraserve.request import AdapterSpec, GenerateRequest
from loraserve.v1 import loraserve_pb2 as pb

PooledMessage: TypeAlias = pb.EmbedRequest | pb.ClassifyRequest | pb.ScoreRequest
Prompt: TypeAlias = str | Sequence[int]
Message = TypeVar("Message", pb.EmbedRequest, pb.ClassifyRequest, pb.ScoreRequest)

_KINDS: dict[int, PoolingKind | None] = {
    pb.POOLING_UNSPECIFIED: None,
    pb.POOLING_LAST: "last",
    pb.POOLING_MEAN: "mean",
    pb.POOLING_CLS: "cls",
}
_POOLINGS: dict[str, pb.Pooling] = {
    "last": pb.POOLING_LAST,
    "mean": pb.POOLING_MEAN,
    "cls": pb.POOLING_CLS,
    "every": pb.POOLING_EVERY,
}


def request_without_prompt(message: PooledMessage, pooling: PoolingParams) -> GenerateRequest:
    """What all prompts of a message have in common.

    Raises InvalidRequestError: both adapter fields are set, or a value is out of its range.
    """
    if message.adapter and message.adapters:
        raise InvalidRequestError("both adapter and adapters are set, set at most one of them")
    return GenerateRequest(
        adapter=message.adapter or dict(message.adapters) or None,
        pooling=pooling,
        deadline_s=message.deadline_s if message.HasField("deadline_s") else None,
        truncate=message.truncate if message.HasField("truncate") else None,
        cache_salt=message.cache_salt if message.HasField("cache_salt") else None,
        user=message.user if message.HasField("user") else None,
    )


def prompts_from_wire(prompts: Iterable[pb.Prompt]) -> list[str | list[int]]:
    """Raises InvalidRequestError: one is neither text nor token ids."""
    found: list[str | list[int]] = []
    for prompt in prompts:
        match prompt.WhichOneof("prompt"):
            case "text":
                found.append(prompt.text)
            case "token_ids":
                found.append(list(prompt.token_ids.ids))
            case _:
                raise InvalidRequestError("a prompt is empty, set one of text and token_ids")
    return found


def pooling_from_wire(message: pb.EmbedRequest) -> PoolingParams:
    """Raises InvalidRequestError: a value is out of its range."""
    every = message.pooling == pb.POOLING_EVERY
    return PoolingParams(
        task="token_embed" if every else "embed",
        kind=None if every else kind_from_wire(message.pooling),
        normalize=message.normalize if message.HasField("normalize") else not every,
        dimensions=message.dimensions if message.HasField("dimensions") else None,
    )


def kind_from_wire(pooling: int) -> PoolingKind | None:
    """Raises InvalidRequestError: it makes no one vector of a prompt."""
    if pooling not in _KINDS:
        raise InvalidRequestError(f"pooling is {pooling}, which makes no one vector of a prompt")
    return _KINDS[pooling]


def embeddings_to_wire(pooled: Iterable[Pooled], prompt_tokens: int) -> pb.EmbedResponse:
    """Vectors in the order of the prompts."""
    embeddings = [
        pb.Embedding(values=one.values.ravel(), num_vectors=len(one.values) if one.values.ndim == 2 else 1)
        for one in pooled
    ]
    return pb.EmbedResponse(embeddings=embeddings, prompt_tokens=prompt_tokens)


def embeddings_from_wire(message: pb.EmbedResponse, *, every: bool) -> list[Pooled]:
    """float32 [dimensions] of each prompt, or [tokens, dimensions] where every token has a vector."""
    arrays = [
        (np.asarray(one.values, dtype=np.float32), max(one.num_vectors, 1)) for one in message.embeddings
    ]
    return [Pooled(array.reshape(num_vectors, -1) if every else array) for array, num_vectors in arrays]


def classes_to_wire(pooled: Sequence[Pooled], prompt_tokens: int) -> pb.ClassifyResponse:
    """Logits and probabilities in the order of the prompts, which have one head."""
    found = [pb.Classification(logits=one.values, probabilities=one.probabilities) for one in pooled]
    labels = pooled[0].labels
    return pb.ClassifyResponse(classifications=found, labels=labels, prompt_tokens=prompt_tokens)


def classes_from_wire(message: pb.ClassifyResponse) -> list[Pooled]:
    """As the server's engine gave them."""
    labels = tuple(message.labels)
    return [
        Pooled(
            np.asarray(one.logits, dtype=np.float32),
            np.asarray(one.probabilities, dtype=np.float32),
            labels,
        )
        for one in message.classifications
    ]


def embed_request(
    prompts: Prompt | Sequence[Prompt],
    adapter: AdapterSpec,
    pooling: str | None,
    normalize: bool | None,
    dimensions: int | None,
    options: dict[str, Any],
) -> pb.EmbedRequest:
    """Raises InvalidRequestError: a value that the wire format can't carry."""
    return _sent(
        pb.EmbedRequest,
        adapter,
        prompts=_prompts(prompts),
        pooling=_pooling(pooling),
        normalize=normalize,
        dimensions=dimensions,
        **options,
    )


def classify_request(
    prompts: Prompt | Sequence[Prompt], adapter: AdapterSpec, options: dict[str, Any]
) -> pb.ClassifyRequest:
    """Raises InvalidRequestError: a value that the wire format can't carry."""
    return _sent(pb.ClassifyRequest, adapter, prompts=_prompts(prompts), **options)


def score_request(
    queries: str | Sequence[str],
    documents: str | Sequence[str],
    adapter: AdapterSpec,
    pooling: str | None,
    options: dict[str, Any],
) -> pb.ScoreRequest:
    """Raises InvalidRequestError: a value that the wire format can't carry."""
    texts = [[one] if isinstance(one, str) else list(one) for one in (queries, documents)]
    return _sent(
        pb.ScoreRequest,
        adapter,
        queries=texts[0],
        documents=texts[1],
        pooling=_pooling(pooling),
        **options,
    )


def _pooling(name: str | None) -> pb.Pooling:
    if name is None:
        return pb.POOLING_UNSPECIFIED
    if name not in _POOLINGS:
        raise InvalidRequestError(f"pooling is {name!r:.100}, it must be one of {', '.join(_POOLINGS)}")
    return _POOLINGS[name]


def _prompts(prompts: Prompt | Sequence[Prompt]) -> list[pb.Prompt]:
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    given: Any = [prompts] if is_one else prompts
    try:
        return [
            pb.Prompt(text=one) if isinstance(one, str) else pb.Prompt(token_ids=pb.TokenIds(ids=one))
            for one in given
        ]
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"a prompt can't be sent: {error}") from error


def _sent(message: type[Message], adapter: AdapterSpec, **fields: Any) -> Message:
    if isinstance(adapter, str):
        fields["adapter"] = adapter
    elif adapter is not None:
        fields["adapters"] = dict(adapter)
    try:
        return message(**fields)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"the request can't be sent: {error}") from error
