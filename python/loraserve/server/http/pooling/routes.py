"""Embeddings, classes, hidden states, scores and rankings."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from loraserve.request import AdapterSpec
from loraserve.server.http.answer import WholeResponse
from loraserve.server.http.call import Call, current_call
from loraserve.server.http.json_route import JsonRoute
from loraserve.server.http.model_names import answering_model
from loraserve.server.http.pooling.answer import (
    PooledHead,
    WholeClasses,
    WholeEmbeddings,
    WholePooling,
    WholeRanking,
    WholeScores,
)
from loraserve.server.http.pooling.openapi import Classes, Embeddings, PooledList, Ranking, Scores, responses
from loraserve.server.http.pooling.request import (
    classify_requests,
    embedding_requests,
    pooling_requests,
    rerank_pairs,
    score_pairs,
)
from loraserve.server.http.pooling.schema import (
    ClassifyBody,
    EmbeddingsBody,
    PooledBody,
    PoolingBody,
    RerankBody,
    ScoreBody,
)

router = APIRouter(tags=["Pooling"], route_class=JsonRoute)


@router.post("/v1/embeddings", responses=responses(Embeddings))
async def embeddings(body: EmbeddingsBody, call: Annotated[Call, Depends(current_call)]) -> Response:
    """A vector of each input."""
    requests = embedding_requests(call, body)
    head = _head(call, body, "embd", requests[0].adapter)
    return WholeResponse(call, requests, WholeEmbeddings(head, body.encoding_format))


@router.post("/pooling", responses=responses(PooledList))
async def pooling(body: PoolingBody, call: Annotated[Call, Depends(current_call)]) -> Response:
    """What each input is pooled to; the hidden state of every token unless `task` says otherwise."""
    requests = pooling_requests(call, body)
    head = _head(call, body, "pool", requests[0].adapter)
    return WholeResponse(call, requests, WholePooling(head, body.encoding_format))


@router.post("/classify", responses=responses(Classes))
async def classify(body: ClassifyBody, call: Annotated[Call, Depends(current_call)]) -> Response:
    """The label of each input, of the adapter's head or the model's."""
    requests = classify_requests(call, body)
    head = _head(call, body, "classify", requests[0].adapter)
    return WholeResponse(call, requests, WholeClasses(head, wants_logits=body.use_activation is False))


@router.post("/score", responses=responses(Scores))
@router.post("/v1/score", responses=responses(Scores))
async def score(body: ScoreBody, call: Annotated[Call, Depends(current_call)]) -> Response:
    """How well texts go together: of a head of one label, else the cosine of their embeddings."""
    scoring = await score_pairs(call, body)
    head = _head(call, body, "score", scoring.requests[0].adapter)
    return WholeResponse(call, scoring.requests, WholeScores(head, scoring))


@router.post("/rerank", responses=responses(Ranking))
@router.post("/v1/rerank", responses=responses(Ranking))
@router.post("/v2/rerank", responses=responses(Ranking))
async def rerank(body: RerankBody, call: Annotated[Call, Depends(current_call)]) -> Response:
    """Documents by how well they answer the query, scored as by /score."""
    scoring, documents = await rerank_pairs(call, body)
    head = _head(call, body, "rerank", scoring.requests[0].adapter)
    shows = call.origin.route != "/v2/rerank" if body.return_documents is None else body.return_documents
    writer = WholeRanking(head, scoring, body.top_n, documents if shows else None)
    return WholeResponse(call, scoring.requests, writer)


def _head(call: Call, body: PooledBody, prefix: str, adapter: AdapterSpec) -> PooledHead:
    model = answering_model(call.state, body.model, adapter)
    return PooledHead(id=f"{prefix}-{call.origin.request_id}", model=model)
