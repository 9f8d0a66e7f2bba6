"""Heads: labels and activations as configs name them, and what all heads take together."""

import gc
from typing import Any

import pytest
import torch
from loraserve.errors import CapacityError
from loraserve.pooling.head import ClassificationHead, HeadMemory


def head(num_labels: int, **config: Any) -> ClassificationHead:
    return ClassificationHead.of_tensors(torch.eye(num_labels, 4), None, config)


@pytest.mark.parametrize(
    ("id2label", "labels"),
    [
        ({"0": "no", "1": "yes"}, ("no", "yes")),
        ({1: "yes", 0: "no"}, ("no", "yes")),
        ({"0": "no"}, ("LABEL_0", "LABEL_1")),
        ({"0": "no", "1": "yes", "2": "more"}, ("LABEL_0", "LABEL_1")),
        ({"0": "no", "1": 5}, ("LABEL_0", "LABEL_1")),
        (["no", "yes"], ("LABEL_0", "LABEL_1")),
        (None, ("LABEL_0", "LABEL_1")),
    ],
)
def test_labels_are_those_of_the_config_where_it_names_all(id2label: Any, labels: tuple[str, ...]) -> None:
    assert head(2, id2label=id2label).labels == labels


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "expected"),
    [
        (2, None, [0.7310586, 0.2689414]),
        (2, "single_label_classification", [0.7310586, 0.2689414]),
        (2, "multi_label_classification", [0.7310586, 0.5]),
        (2, "regression", [1.0, 0.0]),
        (1, None, [1.0]),
        (1, "multi_label_classification", [0.7310586]),
    ],
)
def test_probabilities_are_those_of_the_problem(
    num_labels: int, problem_type: str | None, expected: list[float]
) -> None:
    pooled = head(num_labels, problem_type=problem_type).classify(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert pooled.values.tolist() == [1.0, 0.0][:num_labels]
    assert pooled.probabilities is not None
    assert pooled.probabilities.tolist() == pytest.approx(expected)


def test_heads_take_memory_until_they_are_gone() -> None:
    memory = HeadMemory(100)
    first, second = head(4), head(2)
    memory.take(first)
    assert memory.nbytes == first.nbytes == 64
    memory.take(second)
    third = head(1)
    with pytest.raises(CapacityError, match="take 96 bytes, one more of 16"):
        memory.take(third)
    del first
    gc.collect()
    assert memory.nbytes == 32
    memory.take(third)
