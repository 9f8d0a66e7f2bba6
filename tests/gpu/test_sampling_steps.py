"""Sampled tokens from step to step: buffers that grow, results under way, tokens the host has not seen."""

import numpy as np
import pytest
import torch

from tests.batches import token_batch
from tests.gpu.device import Gpu
from tests.gpu.sampling_building import MAX_NUM_SEQS, Row, Sampling, arrays_of, make_sampling

VOCAB_SIZE = 1000


@pytest.fixture
def sampling(gpu: Gpu) -> Sampling:
    return make_sampling(gpu)


def peaked(tokens: list[int]) -> np.ndarray:
    """Logits whose largest are at these tokens."""
    logits = np.zeros((len(tokens), VOCAB_SIZE), dtype=np.float32)
    logits[np.arange(len(tokens)), tokens] = 5
    return logits


def test_lists_longer_than_any_before_make_room(sampling: Sampling) -> None:
    """The buffer of parameters begins with 64 KiB."""
    rng = np.random.default_rng(0)
    for size in (10, 5000, 20_000, 10):
        vocab_size = max(size, 100)
        logits = rng.standard_normal((3, vocab_size)).astype(np.float32)
        seen = rng.permutation(vocab_size)[:size].tolist()
        allowed = rng.random(vocab_size) < 0.5
        rows = [
            Row(seen=seen, repetition_penalty=3.0),
            Row(temperature=1.0, bits=2**62, allowed=allowed),
            Row(),
        ]
        sampling.check(logits, rows)


def test_several_samplings_may_be_under_way(sampling: Sampling) -> None:
    tokens = [[10 * step + row for row in range(3)] for step in range(7)]
    pending = [sampling.launch(peaked(row), [Row(num_logprobs=1)] * 3) for row in tokens]
    for index in (6, 0, 1, 2, 3, 4, 5):
        assert pending[index].wait().token_ids.tolist() == tokens[index]
        assert pending[index].wait().token_ids.tolist() == tokens[index]


def test_results_nobody_waited_for_are_dropped(sampling: Sampling) -> None:
    for step in range(5):
        sampling.launch(peaked([step]), [Row()])
        assert sampling.sample(peaked([step + 100]), [Row()]).token_ids.tolist() == [step + 100]


def test_an_empty_sampling_is_no_error(sampling: Sampling) -> None:
    assert sampling.sample(peaked([]), []).token_ids.tolist() == []


@pytest.mark.parametrize("padded_tokens", [None, 16])
def test_a_step_takes_tokens_the_host_has_not_seen(
    sampling: Sampling, gpu: Gpu, padded_tokens: int | None
) -> None:
    tokens = np.random.default_rng(1).integers(0, VOCAB_SIZE, MAX_NUM_SEQS).tolist()
    pending = sampling.launch(peaked(tokens), [Row()] * MAX_NUM_SEQS)
    ids = np.array([-1, 7, -64, -3, 0, -64], dtype=np.int32)
    step = sampling.kernels.begin_step(token_batch(6, ids).build(), gpu.stream, padded_tokens=padded_tokens)
    expected = [tokens[0], 7, tokens[63], tokens[2], 0, tokens[63]]
    expected += [0] * ((padded_tokens or 6) - 6)
    assert gpu.read_int32(step.token_ids_ptr, len(expected)) == expected
    assert pending.wait().token_ids.tolist() == tokens


def test_tokens_of_a_row_that_was_not_sampled_are_refused(sampling: Sampling, gpu: Gpu) -> None:
    def begin(token_id: int) -> None:
        batch = token_batch(1, np.array([token_id], dtype=np.int32))
        sampling.kernels.begin_step(batch.build(), gpu.stream)

    with pytest.raises(ValueError, match="sampled row of a token is 0, limit is 0"):
        begin(-1)
    sampling.sample(peaked([1, 2]), [Row()] * 2)
    begin(-2)
    with pytest.raises(ValueError, match="sampled row of a token is 2, limit is 2"):
        begin(-3)
    with pytest.raises(ValueError, match="sampled row of a token is 2147483647, limit is 2"):
        begin(-(2**31))


def test_logits_of_plain_rows_stay_as_they_are(sampling: Sampling, gpu: Gpu) -> None:
    logits = gpu.place(torch.randn(2, VOCAB_SIZE))
    before = logits.clone()
    rows = [Row(temperature=1.0, top_p=0.5, num_logprobs=2), Row(banned=[4])]
    sampling.kernels.sample(logits.data_ptr(), arrays_of(VOCAB_SIZE, rows), gpu.stream).wait()
    before[1, 4] = -torch.inf
    assert torch.equal(logits, before)
