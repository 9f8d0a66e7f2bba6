"""`PoolingParams`: what becomes of a prompt's hidden states; `Pooled`: what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        kind: the vector is the last token's ("last"), the mean of all ("mean") or the first token's ("cls").
            Heads read the last token's.
        normalize: give vectors the length 1; of embeddings only.
        dimensions: keep only as many components, the first ones, of a model that was trained for that
            (arXiv:2205.13147); None keeps all. Cut first, then normalised.

    Raises:
        InvalidRequestError: a value is out of its range, or two contradict each other.
    """

    task: PoolingTask = "embed"
    kind: PoolingKind = "last"
    normalize: bool = True
    dimensions: int | None = None

    def __post_init__(self) -> None:
        _check_one_of("task", self.task, get_args(PoolingTask))
        _check_one_of("pooling", self.kind, get_args(PoolingKind))
        check_bool("normalize", self.normalize)
        if self.dimensions is not None:
            check_int("dimensions", self.dimensions, 1, MAX_DIMENSIONS)
        if self.task == "classify" and (self.kind != "last" or self.dimensions is not None):
            raise InvalidRequestError(
                "heads read all of the last token's hidden state: leave out pooling and dimensions"
            )
        if self.task == "token_embed" and self.kind != "last":
            raise InvalidRequestError(
                f"pooling is {self.kind!r}, but each token keeps its vector: leave it out"
            )

    def check_dimensions(self, hidden_size: int) -> None:
        """Raises InvalidRequestError: more are asked for than the model's hidden states have."""
        if self.dimensions is not None and self.dimensions > hidden_size:
            raise InvalidRequestError(
                f"dimensions is {self.dimensions}, the model's hidden states have {hidden_size}"
            )

    @property
    def rows(self) -> PromptRows:
        """Which rows of the prompt have to be computed."""
        return "last" if self.kind == "last" and self.task != "token_embed" else "all"


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


def _check_one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InvalidRequestError(f"{name} is {value!r:.100}, it must be one of {', '.join(allowed)}")
