"""Rows to sample, their arrays, and the kernels beside the reference."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from loraserve import _core
from loraserve.models.ops import KvGeometry

from tests.gpu.device import Gpu

GEOMETRY = KvGeometry(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32)
DTYPE = torch.bfloat16
MAX_NUM_SEQS = 64
Logits = npt.NDArray[np.float32]


@dataclass
class Row:
    """As `RowParams`; lists are given here and become ranges of the step's."""

    bits: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    num_logprobs: int | None = None
    seen: Sequence[int] = ()
    counted: dict[int, int] = field(default_factory=dict)
    biased: dict[int, float] = field(default_factory=dict)
    banned: Sequence[int] = ()
    allowed: npt.NDArray[np.bool_] | None = None


def arrays_of(vocab_size: int, rows: Sequence[Row]) -> _core.SampleArrays:
    lists: dict[str, list[Any]] = {
        name: []
        for name in ("seen_ids", "counted_ids", "counts", "biased_ids", "biases", "banned_ids", "masks")
    }

    def part(name: str, values: Sequence[int]) -> tuple[int, int]:
        start = len(lists[name])
        lists[name].extend(values)
        return start, len(lists[name])

    dicts = []
    num_masks = 0
    for row in rows:
        values = asdict(row)
        values["seen"] = part("seen_ids", row.seen)
        values["counted"] = part("counted_ids", list(row.counted))
        values["biased"] = part("biased_ids", list(row.biased))
        values["banned"] = part("banned_ids", row.banned)
        lists["counts"].extend(row.counted.values())
        lists["biases"].extend(row.biased.values())
        values["mask"] = None
        if values.pop("allowed") is not None:
            values["mask"] = num_masks
            num_masks += 1
            lists["masks"].extend(mask_words(row.allowed))
        dicts.append(values)
    return _core.SampleArrays(vocab_size, dicts, **lists)


def mask_words(allowed: npt.NDArray[np.bool_] | None) -> list[int]:
    assert allowed is not None
    padded = np.zeros(-(-len(allowed) // 32) * 32, dtype=np.bool_)
    padded[: len(allowed)] = allowed
    words: list[int] = np.packbits(padded, bitorder="little").view("<u4").tolist()
    return words


@dataclass
class Sampling:
    """Kernels, and every tensor of logits they were given."""

    gpu: Gpu
    kernels: _core.CudaKernels
    placed: list[torch.Tensor] = field(default_factory=list)

    def launch(self, logits: Logits, rows: Sequence[Row]) -> _core.PendingSamples:
        placed = self.gpu.place(torch.from_numpy(logits.copy()))
        self.placed.append(placed)
        return self.kernels.sample(placed.data_ptr(), arrays_of(logits.shape[1], rows), self.gpu.stream)

    def sample(self, logits: Logits, rows: Sequence[Row]) -> _core.SampledRows:
        return self.launch(logits, rows).wait()

    def check(self, logits: Logits, rows: Sequence[Row]) -> _core.SampledRows:
        """Samples; everything must be the reference's."""
        actual = self.sample(logits, rows)
        expected = arrays_of(logits.shape[1], rows).reference(logits)
        for index, row in enumerate(rows):
            told = f"row {index}: {row}"
            assert actual.is_finite[index] == expected.is_finite[index], told
            assert actual.token_ids[index] == expected.token_ids[index], told
            assert_logprobs(actual.logprobs[index], expected.logprobs[index], told)
        return actual


Logprob = tuple[float, list[tuple[int, float]]]


def assert_logprobs(actual: Logprob | None, expected: Logprob | None, told: str) -> None:
    assert (actual is None) == (expected is None), told
    if actual is None or expected is None:
        return
    assert actual[0] == expected[0] or is_near(actual[0], expected[0]), told
    assert [token for token, _ in actual[1]] == [token for token, _ in expected[1]], told
    pairs = zip(actual[1], expected[1], strict=True)
    assert all(a == e or is_near(a, e) for (_, a), (_, e) in pairs), told


def is_near(actual: float, expected: float) -> bool:
    """Within 1e-5, or where floats lie further apart, within their distance."""
    return abs(actual - expected) <= max(1e-5, 2**-22 * abs(expected))


def make_sampling(gpu: Gpu) -> Sampling:
    pool = gpu.zeros(64 * GEOMETRY.page_nbytes(DTYPE), dtype=torch.uint8)
    kernels = gpu.kernels(GEOMETRY, DTYPE, pool, groups=[(32, 32)] * 4, max_num_seqs=MAX_NUM_SEQS)
    return Sampling(gpu, kernels)


def random_logits(rng: np.random.Generator, num_rows: int, vocab_size: int) -> Logits:
    """Normal ones, rows full of ties, of both zeros, with -inf in part, and rows that are not finite."""
    return np.stack([_random_row(rng, index % 8, vocab_size) for index in range(num_rows)]).astype(np.float32)


def _random_row(rng: np.random.Generator, kind: int, vocab_size: int) -> npt.NDArray[np.float64]:
    row = rng.standard_normal(vocab_size) * rng.choice([0.01, 1, 3, 10, 40])
    if kind == 0:
        return np.round(row)
    if kind == 1:
        return rng.choice([0.0, -0.0], vocab_size)
    if kind == 2:
        row[rng.random(vocab_size) < 0.5] = -np.inf
        row[rng.integers(vocab_size)] = 1
    if kind == 3:
        row = np.where(rng.random(vocab_size) < 0.1, -0.0, np.round(4 * row) / 4)
    if kind == 4:
        row[rng.integers(vocab_size)] = rng.choice([np.nan, -np.nan, np.inf])
    return row


def random_row(rng: np.random.Generator, vocab_size: int) -> Row:
    """A row that asks for anything."""

    def some(probability: float) -> bool:
        return bool(rng.random() < probability)

    def ids(most: int) -> list[int]:
        chosen: list[int] = rng.choice(
            vocab_size, size=min(vocab_size, int(rng.integers(1, most))), replace=False
        ).tolist()
        return chosen

    row = random_draw(rng)
    if some(0.3):
        row.top_k = int(rng.choice([1, 2, 5, 50, 1000, vocab_size, 2**31 - 1]))
    if some(0.3):
        row.top_p = float(rng.choice([1e-9, 0.1, 0.5, 0.9, 0.95, 0.999, 1 - 2**-53]))
    if some(0.2):
        row.min_p = float(rng.choice([1e-300, 1e-6, 0.05, 0.5, 1]))
    if some(0.2):
        row.typical_p = float(rng.choice([1e-9, 0.2, 0.5, 0.9, 0.99]))
    if some(0.4):
        row.num_logprobs = int(rng.integers(0, 21))
    if some(0.3):
        row.repetition_penalty, row.seen = float(rng.choice([0.01, 0.8, 1.3, 100])), ids(3000)
    if some(0.3):
        row.presence_penalty, row.frequency_penalty = rng.uniform(-2, 2, 2).tolist()
        row.counted = {token: int(rng.integers(1, 9)) for token in ids(500)}
    if some(0.3):
        row.biased = {token: float(rng.uniform(-100, 100)) for token in ids(100)}
    if some(0.2):
        row.banned = ids(50)
    if some(0.2):
        row.allowed = rng.random(vocab_size) < rng.choice([0.0, 0.001, 0.1, 0.9])
    return row


def random_draw(rng: np.random.Generator) -> Row:
    bits = int(rng.integers(0, 2**64, dtype=np.uint64))
    return Row(bits=bits, temperature=float(rng.choice([0, 1e-5, 0.3, 0.7, 1, 1.5, 100])))
