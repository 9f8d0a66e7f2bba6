"""`ClassificationHead`: labels from a hidden state; of an adapter's file or of a checkpoint."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from loraserve._core import Receipt
from loraserve.errors import CapacityError
from loraserve.pooling.params import Pooled

Activation: TypeAlias = Literal["softmax", "sigmoid", "none"]


@dataclass(frozen=True, eq=False)
class ClassificationHead:
    """logits = weight · hidden + bias, in float32 on the CPU.

    Args:
        weight: [labels, hidden].
        bias: [labels]; None where there is none.
        labels: their names.
        activation: what makes probabilities of logits.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    labels: tuple[str, ...]
    activation: Activation

    @staticmethod
    def of_tensors(
        weight: torch.Tensor, bias: torch.Tensor | None, config: Mapping[str, Any]
    ) -> ClassificationHead:
        """A head with what a `config.json` says of it (`id2label`, `problem_type`), as transformers does.

        Labels that the config does not name, or not all of, are LABEL_0, LABEL_1, …
        """
        num_labels = len(weight)
        labels = _labels(config.get("id2label"), num_labels)
        multiple = config.get("problem_type") == "multi_label_classification"
        regression = num_labels == 1 or config.get("problem_type") == "regression"
        activation: Activation = "sigmoid" if multiple else "none" if regression else "softmax"
        return ClassificationHead(weight, bias, labels, activation)

    @staticmethod
    def of_receipt(receipt: Receipt, config: Mapping[str, Any]) -> ClassificationHead | None:
        """The head in an adapter's file, with what lies beside it; None where it has none."""
        parts = receipt.head
        if parts is None:
            return None
        _, num_labels, num_features, weight, bias = parts
        return ClassificationHead.of_tensors(
            _tensor(weight).view(num_labels, num_features), None if bias is None else _tensor(bias), config
        )

    @property
    def nbytes(self) -> int:
        """What it takes in main memory."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def classify(self, hidden: torch.Tensor) -> Pooled:
        """Logits and probabilities of one hidden state, float32 [hidden]."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        match self.activation:
            case "softmax":
                probabilities = logits.softmax(-1)
            case "sigmoid":
                probabilities = logits.sigmoid()
            case "none":
                probabilities = logits
        return Pooled(logits.numpy(), probabilities.numpy(), self.labels)


class HeadMemory:
    """Counts what heads take as long as they live; for any thread.

    Args:
        limit_nbytes: what they may take together.
    """

    def __init__(self, limit_nbytes: int) -> None:
        self._limit_nbytes = limit_nbytes
        self._lock = threading.Lock()
        self._taken: dict[int, int] = {}  # bytes by number, of those that live
        self._numbers = itertools.count()

    @property
    def nbytes(self) -> int:
        """What they take now."""
        return sum(list(self._taken.values()))

    def take(self, head: ClassificationHead) -> None:
        """Count a head until it is gone. Raises CapacityError: there is no room for it."""
        with self._lock:
            if self.nbytes + head.nbytes > self._limit_nbytes:
                raise CapacityError(
                    f"heads to classify with take {self.nbytes} bytes, one more of {head.nbytes} would go "
                    f"over the limit of {self._limit_nbytes}: unload adapters with heads"
                )
            number = next(self._numbers)
            self._taken[number] = head.nbytes
        # Without the lock: a finalizer may run where it is held.
        weakref.finalize(head, self._taken.pop, number).atexit = False


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32)


def _labels(id2label: object, num_labels: int) -> tuple[str, ...]:
    default = tuple(f"LABEL_{index}" for index in range(num_labels))
    if not isinstance(id2label, Mapping):
        return default
    named = {str(key): value for key, value in id2label.items()}
    labels = [named.get(str(index)) for index in range(num_labels)]
    is_whole = len(named) == num_labels and all(isinstance(label, str) for label in labels)
    return tuple(str(label) for label in labels) if is_whole else default
