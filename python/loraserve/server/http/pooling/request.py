"""Bodies of the pooling routes to engine requests."""

from __future__ import annotations

from collections.abc import Sequence

from loraserve.engine.scoring import Scoring
from loraserve.errors import InvalidRequestError
from loraserve.pooling.params import PoolingKind, PoolingParams
from loraserve.request import AdapterSpec, GenerateRequest
from loraserve.server.http.adapter_selectors import adapter_of
from loraserve.server.http.call import Call
from loraserve.server.http.openai.request import truncation
from loraserve.server.http.pooling.schema import (
    ClassifyBody,
    EmbeddingsBody,
    PooledBody,
    PoolingBody,
    RerankBody,
    ScoreBody,
    VectorBody,
    inputs_of,
)

COHERE_MAX_TOKENS = 4096  # the default of max_tokens_per_doc, which clients send by themselves


def embedding_requests(call: Call, body: EmbeddingsBody) -> list[GenerateRequest]:
    """One request per input. Raises InvalidRequestError."""
    params = PoolingParams(
        kind=body.pooling, normalize=body.normalize is not False, dimensions=body.dimensions
    )
    return _requests(call, body, params)


def classify_requests(call: Call, body: ClassifyBody) -> list[GenerateRequest]:
    """One request per input. Raises InvalidRequestError."""
    return _requests(call, body, PoolingParams(task="classify"))


def pooling_requests(call: Call, body: PoolingBody) -> list[GenerateRequest]:
    """One request per input; vectors of tokens are normalised only if that is asked for.

    Raises InvalidRequestError.
    """
    task = body.task or "token_embed"
    normalize = task == "embed" if body.normalize is None else body.normalize
    params = PoolingParams(task=task, kind=body.pooling, normalize=normalize, dimensions=body.dimensions)
    return _requests(call, body, params)


async def score_pairs(call: Call, body: ScoreBody) -> Scoring:
    """What scores the pairs. Raises InvalidRequestError."""
    queries = _either(body.text_1, body.queries, "text_1", "queries")
    documents = _either(body.text_2, body.documents, "text_2", "documents")
    return await _scoring(call, body, queries, documents, body.pooling)


async def rerank_pairs(call: Call, body: RerankBody) -> tuple[Scoring, list[str]]:
    """What scores the documents, and their texts. Raises InvalidRequestError."""
    documents = [one if isinstance(one, str) else one.text for one in body.documents]
    _check_uncut(call, documents, body.max_tokens_per_doc)
    return await _scoring(call, body, [body.query], documents, body.pooling), documents


def _check_uncut(call: Call, documents: Sequence[str], max_tokens: int | None) -> None:
    """A token is at least a byte of text. Raises InvalidRequestError: a document might be cut."""
    if max_tokens is None or max_tokens >= min(COHERE_MAX_TOKENS, call.state.max_model_len):
        return
    if any(len(text.encode()) > max_tokens for text in documents):
        raise InvalidRequestError(
            f"max_tokens_per_doc is {max_tokens}, but documents are not cut here: cut them before, and leave "
            "it out"
        )


async def _scoring(
    call: Call, body: PooledBody, queries: list[str], documents: list[str], kind: PoolingKind | None
) -> Scoring:
    call.state.limits.check_num_inputs(max(len(queries), len(documents)))
    adapter = adapter_of(call.state, call.caller, body.model, body, num_prompts=len(documents))
    request = _request(call, body, adapter, PoolingParams(kind=kind))
    head = await call.state.runner.head_of(adapter, call.origin)
    return Scoring.of(queries, documents, request, head)


def _requests(call: Call, body: ClassifyBody | VectorBody, params: PoolingParams) -> list[GenerateRequest]:
    inputs = inputs_of(body.input)
    call.state.limits.check_num_inputs(len(inputs))
    adapter = adapter_of(call.state, call.caller, body.model, body, num_prompts=len(inputs))
    return [_request(call, body, adapter, params, prompt) for prompt in inputs]


def _request(
    call: Call,
    body: PooledBody,
    adapter: AdapterSpec,
    params: PoolingParams,
    prompt: str | Sequence[int] | None = None,
) -> GenerateRequest:
    return GenerateRequest(
        prompt=prompt,
        adapter=adapter,
        pooling=params,
        deadline_s=call.deadline_s,
        truncate=truncation(call, body.truncate_prompt_tokens, 0),
        cache_salt=body.cache_salt,
        user=body.asker,
    )


def _either(
    first: str | list[str] | None, second: str | list[str] | None, name: str, other: str
) -> list[str]:
    if (first is None) == (second is None):
        raise InvalidRequestError(f"give one of {name} and {other}")
    given = second if first is None else first
    return [given] if isinstance(given, str) else list(given or ())
