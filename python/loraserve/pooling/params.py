"""`PoolingParams`: what becomes of a prompt's hidden states; `Pooled`: what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from loraserve.errors import InvalidRequestError
from loraserve.validation.values import check_bool, check_int

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PoolingTask: TypeAlias = Literal["embed", "classify", "token_embed"]
PoolingKind: TypeAlias = Literal["last", "mean", "cls"]
PromptRows: TypeAlias = Literal["last", "all"]
"""Of which tokens of a prompt hidden states are asked for."""

MAX_DIMENSIONS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """What is made of a prompt's hidden states, those behind the final norm; checked when built.

    Args:
        task: "embed" makes one vector of all, "classify" gives it to the head that adapter or model has,
            "token_embed" makes a vector of each token.
        kind: the vector is the last token's ("last"), the mean of all ("mean") or the first token's ("cls");
            None is as the adapter's or the model's files say, else the last token's. Heads read the last
            token's.
        normalize: give vectors the length 1; of embeddings only.
        dimensions: keep only as many components, the first ones, of a model that was trained for that
            (arXiv:2205.13147); None keeps all. Cut first, then normalised.

    Raises:
        InvalidRequestError: a value is out of its range, or two contradict each other.
    """

    task: PoolingTask = "embed"
    kind: PoolingKind | None = None
    normalize: bool = True
    dimensions: int | None = None

    def __post_init__(self) -> None:
        _check_one_of("task", self.task, get_args(PoolingTask))
        if self.kind is not None:
            check_pooling(self.kind)
        check_bool("normalize", self.normalize)
        if self.dimensions is not None:
            check_int("dimensions", self.dimensions, 1, MAX_DIMENSIONS)
        is_chosen = self.kind not in (None, "last")
        if self.task == "classify" and (is_chosen or self.dimensions is not None):
            raise InvalidRequestError(
                "heads read all of the last token's hidden state: leave out pooling and dimensions"
            )
        if self.task == "token_embed" and is_chosen:
            raise InvalidRequestError(
                f"pooling is {self.kind!r}, but each token keeps its vector: leave it out"
            )

    def check_dimensions(self, hidden_size: int) -> None:
        """Raises InvalidRequestError: more are asked for than the model's hidden states have."""
        if self.dimensions is not None and self.dimensions > hidden_size:
            raise InvalidRequestError(
                f"dimensions is {self.dimensions}, the model's hidden states have {hidden_size}"
            )

    def with_default(self, kind: PoolingKind | None) -> PoolingParams:
        """These, where they leave it open with this kind for embeddings."""
        is_open = self.kind is None and self.task == "embed"
        return replace(self, kind=kind) if is_open else self

    @property
    def rows(self) -> PromptRows:
        """Which rows of the prompt have to be computed."""
        is_last = self.kind in (None, "last")
        return "last" if is_last and self.task != "token_embed" else "all"


@dataclass(frozen=True)
class Pooled:
    """What a prompt was pooled to.

    Args:
        values: float32; [dimensions] of an embedding, [tokens, dimensions] of one for each token, [labels] of
            a classification: its logits.
        probabilities: float32 [labels]: softmax of the logits, sigmoid of each where several labels may hold,
            the logit itself of a head of one label; None of embeddings.
        labels: the labels' names; empty of embeddings.
    """

    values: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32] | None = None
    labels: Sequence[str] = ()


def check_pooling(kind: object) -> None:
    """Raises InvalidRequestError: it is no way to make one vector of a prompt."""
    _check_one_of("pooling", kind, get_args(PoolingKind))


def _check_one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InvalidRequestError(f"{name} is {value!r:.100}, it must be one of {', '.join(allowed)}")
