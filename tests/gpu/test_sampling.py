"""The sampling kernels against the reference: tokens bit for bit, logprobs to 1e-5."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.gpu.device import Gpu
from tests.gpu.sampling_building import (
    Row,
    Sampling,
    arrays_of,
    is_near,
    make_sampling,
    random_draw,
    random_logits,
    random_row,
)


@pytest.fixture
def sampling(gpu: Gpu) -> Sampling:
    return make_sampling(gpu)


@pytest.mark.parametrize(
    ("vocab_size", "num_rows", "seed"),
    [(1, 16, 0), (4, 24, 1), (259, 48, 2), (4099, 24, 3), (32000, 16, 4), (128256, 5, 5), (262144, 2, 6)],
)
def test_rows_that_ask_for_anything_get_the_references_tokens(
    sampling: Sampling, vocab_size: int, num_rows: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, num_rows, vocab_size)
    actual = sampling.check(logits, [random_row(rng, vocab_size) for _ in range(num_rows)])
    assert num_rows < 8 or not all(actual.is_finite)


TRUNCATIONS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 900},
    {"top_p": 0.5},
    {"top_p": 0.97},
    {"min_p": 0.1},
    {"typical_p": 0.3},
    {"typical_p": 0.95},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"top_p": 0.9, "typical_p": 0.6},
    {"top_k": 200, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.5},
]


@pytest.mark.parametrize("step", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_every_truncation_keeps_what_the_reference_keeps(
    sampling: Sampling, truncation: dict[str, float], step: float
) -> None:
    """Logits on a grid are full of ties."""
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((8, 1001))).astype(np.float32)
    if step:
        logits = np.round(logits / step).astype(np.float32) * np.float32(step)
    draws = [replace(random_draw(rng), **truncation) for _ in range(8)]  # type: ignore[arg-type]
    sampling.check(logits, draws)


def test_ties_by_the_thousand_are_told_apart_by_id(sampling: Sampling) -> None:
    """More than the kernel lists: 5,000 equal tokens, a part of which stays."""
    logits = np.zeros((6, 6000), dtype=np.float32)
    logits[:, ::6] = -1
    rng = np.random.default_rng(0)
    draws = [replace(random_draw(rng), temperature=1.0) for _ in range(6)]
    for truncation in ({"top_k": 1234}, {"top_p": 0.3}, {"typical_p": 0.4}):
        sampling.check(logits, [replace(row, **truncation) for row in draws])  # type: ignore[arg-type]


def test_draws_reach_every_part_of_a_row(sampling: Sampling) -> None:
    """The sums of weights over their whole range are the reference's to the last unit."""
    logits = -np.linspace(0, 24, 40_000, dtype=np.float32)[np.newaxis].repeat(32, axis=0)
    rows = [Row(bits=min(index * 2**59, 2**64 - 1), temperature=1.0) for index in range(33)][1:]
    tokens = sampling.check(logits, rows).token_ids
    assert (np.diff(tokens) > 0).all()


def test_a_row_gets_the_same_token_alone(sampling: Sampling) -> None:
    rng = np.random.default_rng(1)
    logits = random_logits(rng, 12, 9001)
    rows = [random_row(rng, 9001) for _ in range(12)]
    together = sampling.sample(logits, rows)
    for index, row in enumerate(rows):
        alone = sampling.sample(logits[index : index + 1], [row])
        assert alone.token_ids[0] == together.token_ids[index]
        assert alone.is_finite[0] == together.is_finite[index]
        assert alone.logprobs[0] == together.logprobs[index]


def test_rows_that_are_not_finite_are_told_and_disturb_no_other(sampling: Sampling) -> None:
    logits = np.tile(np.arange(5000, dtype=np.float32), (6, 1))
    logits[1, 4999] = np.nan
    logits[2, 0] = np.inf
    logits[3] = -np.inf
    logits[4, 4097] = -np.inf
    for temperature in (0.0, 1e-5):
        sampled = sampling.check(logits, [Row(temperature=temperature, num_logprobs=3)] * 6)
        assert sampled.is_finite.tolist() == [True, False, False, False, True, True]
        assert sampled.token_ids.tolist() == [4999, 0, 0, 0, 4999, 4999]


@pytest.mark.parametrize("vocab_size", [7, 32000])
def test_logprobs_are_torchs(sampling: Sampling, vocab_size: int) -> None:
    """Of the logits as they came, whatever was changed before the token was chosen."""
    rng = np.random.default_rng(2)
    logits = (5 * rng.standard_normal((4, vocab_size))).astype(np.float32)
    likeliest = int(logits[3].argmax())
    rows = [
        Row(num_logprobs=0),
        Row(num_logprobs=20, temperature=1.0, bits=2**63),
        Row(num_logprobs=5, seen=[3, 6], repetition_penalty=2.0, counted={3: 1}, biased={3: 100.0}),
        Row(num_logprobs=1, banned=[likeliest]),
    ]
    sampled = sampling.check(logits, rows)
    expected = torch.log_softmax(torch.from_numpy(logits), dim=-1)
    assert sampled.token_ids[2] == 3
    assert sampled.token_ids[3] != likeliest
    for index, row in enumerate(rows):
        logprob = sampled.logprobs[index]
        assert logprob is not None
        assert is_near(logprob[0], float(expected[index, int(sampled.token_ids[index])]))
        values, ids = expected[index].topk(min(row.num_logprobs or 0, vocab_size))
        assert [token for token, _ in logprob[1]] == ids.tolist()
        pairs = zip(logprob[1], values.tolist(), strict=True)
        assert all(is_near(actual, value) for (_, actual), value in pairs)


def test_equal_logprobs_come_in_the_order_of_ids(sampling: Sampling) -> None:
    logits = np.zeros((1, 10_000), dtype=np.float32)
    ((_, top),) = [logprob for logprob in sampling.sample(logits, [Row(num_logprobs=20)]).logprobs if logprob]
    assert [token for token, _ in top] == list(range(20))


def test_a_row_of_which_nothing_is_left_gets_the_first_token(sampling: Sampling) -> None:
    logits = np.array([[1.0, 3.0, 2.0]], dtype=np.float32)
    nothing = np.zeros(3, dtype=np.bool_)
    for row in (Row(banned=[0, 1, 2, 1]), Row(allowed=nothing), Row(allowed=nothing, seen=[0])):
        for temperature in (0.0, 1.0):
            sampled = sampling.check(logits, [replace(row, temperature=temperature, num_logprobs=1)])
            assert sampled.token_ids.tolist() == [0]


def test_penalties_that_overflow_choose_the_first_of_the_largest(sampling: Sampling) -> None:
    logits = np.full((1, 5), 3e38, dtype=np.float32)
    row = Row(temperature=1.0, seen=[2, 3], repetition_penalty=0.01, num_logprobs=2)
    assert sampling.check(logits, [row]).token_ids.tolist() == [2]


def test_what_can_not_be_sampled_is_refused(sampling: Sampling, gpu: Gpu) -> None:
    logits = gpu.zeros(65, 16, dtype=torch.float32)
    pointer, stream = logits.data_ptr(), gpu.stream
    for message, arrays, offset in [
        ("rows to sample is 65, limit is 65", arrays_of(16, [Row()] * 65), 0),
        ("logprobs is 21, limit is 21", arrays_of(16, [Row(num_logprobs=21)]), 0),
        ("vocabulary is 327681, limit is 327681", arrays_of(327681, [Row()]), 0),
        ("token id is 16, limit is 16", arrays_of(16, [Row(seen=[16])]), 0),
        ("token id is -1, limit is 16", arrays_of(16, [Row(banned=[-1])]), 0),
        ("not 16-byte aligned", arrays_of(16, [Row()]), 4),
    ]:
        with pytest.raises(ValueError, match=message):
            sampling.kernels.sample(pointer + offset, arrays, stream)
