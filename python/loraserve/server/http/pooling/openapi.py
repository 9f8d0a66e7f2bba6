"""What the pooling routes answer with, for the OpenAPI document; answers are built without these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from loraserve.server.http.openai.openapi import GENERATION_RESPONSES, Responses


class _Document(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class PoolingUsage(_Document):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class Embedding(_Document):
    """A list of numbers, or base64 of them as float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(_Document):
    """In the order of the inputs."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PoolingUsage


class _List(_Document):
    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: PoolingUsage


class ClassEntry(_Document):
    """The likeliest label, and the probability of each; the logit itself of a head of one label."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classes(_List):
    """In the order of the inputs."""

    data: list[ClassEntry]


class PooledEntry(_Document):
    """A vector, a vector for each token, or probabilities; or base64 of them as float32."""

    index: int
    object: Literal["pooling"]
    data: list[float] | list[list[float]] | str


class PooledList(_List):
    """In the order of the inputs."""

    data: list[PooledEntry]


class ScoreEntry(_Document):
    """Of one pair."""

    index: int
    object: Literal["score"]
    score: float


class Scores(_List):
    """In the order of the pairs."""

    data: list[ScoreEntry]


class RankedDocument(_Document):
    """The document as it was given."""

    text: str


class RankedEntry(_Document):
    """`index` is the document's place in the request."""

    index: int
    relevance_score: float
    document: RankedDocument | None = None


class Ranking(_Document):
    """The best first."""

    id: str
    model: str
    usage: PoolingUsage
    results: list[RankedEntry]
    meta: dict[str, Any]


def responses(model: type[BaseModel]) -> Responses:
    """A route's, that answers with `model`; its errors are those of generating routes."""
    return {**GENERATION_RESPONSES, 200: {"model": model}}
