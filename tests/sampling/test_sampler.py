"""The sampler alone: its distribution, its truncations against plain definitions, its row independence."""

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from loraserve.sampling import sampler
from loraserve.sampling.sampler import Sampled, SamplingState, uniform
from loraserve.sampling_params import SamplingParams

VOCAB = 4000


def sample(logits: torch.Tensor, states: Sequence[SamplingState]) -> Sampled:
    """Of states that stay as they are."""
    unchanged = [copy.copy(state) for state in states]
    return sampler.sample(logits, unchanged, lambda logits: logits.argmax(dim=-1).tolist())


def state(seed: int = 0, index: int = 0, **settings: object) -> SamplingState:
    params = SamplingParams(max_tokens=100, **settings)
    return SamplingState(params, seed, prompt_token_ids=[1, 2], banned_until_min_tokens=[0], num_drawn=index)


def draws(logits: torch.Tensor, count: int, **settings: object) -> Counter[int]:
    rows = logits.repeat(count, 1)
    return Counter(sample(rows, [state(seed, **settings) for seed in range(count)]).token_ids.tolist())


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    counts = draws(logits, 4000, temperature=0.8)
    expected = torch.softmax(logits / 0.8, -1)
    for token_id, probability in enumerate(expected.tolist()):
        assert counts[token_id] / 4000 == pytest.approx(probability, abs=0.03)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("top_k", [3, 1500])
def test_top_k_keeps_the_k_likeliest(top_k: int, temperature: float) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 0.1
    allowed = set(logits.topk(top_k).indices.tolist())
    assert set(draws(logits, 300, top_k=top_k, temperature=temperature)) <= allowed


@pytest.mark.parametrize(("scale", "top_p"), [(3.0, 0.5), (0.05, 0.9), (0.01, 0.25)])
def test_top_p_keeps_the_smallest_sufficient_set(scale: float, top_p: float) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2)) * scale
    probs, ids = torch.softmax(logits, -1).sort(descending=True, stable=True)
    size = int((probs.double().cumsum(0) < top_p - 1e-6).sum()) + 1
    seen = set(draws(logits, 300, top_p=top_p))
    assert seen <= set(ids[: size + 1].tolist())
    assert len(seen) > 1


def test_top_p_of_equally_likely_tokens_keeps_as_many_as_it_needs() -> None:
    assert len(draws(torch.zeros(VOCAB), 3000, top_p=0.01)) == VOCAB // 100


def test_min_p_drops_what_is_much_less_likely_than_the_best() -> None:
    logits = torch.full((VOCAB,), 0.0)
    logits[:10] = 5.0
    assert set(draws(logits, 200, min_p=0.1)) <= set(range(10))
    assert not set(draws(logits, 200, min_p=0.001)) <= set(range(10))


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(3))
    settings = [
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"temperature": 0.0},
        {"min_p": 0.2},
        {"top_k": 2000},
        {},
        {},
    ]
    states = [state(seed, **setting) for seed, setting in enumerate(settings)]
    together = sample(logits.clone(), states).token_ids
    alone = [sample(logits[i : i + 1].clone(), [states[i]]).token_ids[0] for i in range(8)]
    assert together.tolist() == alone


def test_greedy_rows_that_change_nothing_mix_with_rows_that_do() -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(4))
    likeliest = logits.argmax(dim=-1).tolist()
    states = [
        state(temperature=0.0),
        state(temperature=0.0, logit_bias={5: 100.0}),
        state(temperature=0.0, min_tokens=2),
        state(temperature=0.0, logprobs=1),
        state(seed=3, top_k=1),
        state(temperature=0.0),
    ]
    assert [one.is_plain for one in states] == [True, False, False, False, False, True]
    changed = logits.clone()
    sampled = sample(changed, states)
    assert sampled.token_ids.tolist() == [likeliest[0], 5, *likeliest[2:]]
    assert torch.equal(changed[[0, 3, 4, 5]], logits[[0, 3, 4, 5]])
    assert [one is not None for one in sampled.logprobs] == [False, False, False, True, False, False]


def test_penalties_change_logits_as_defined() -> None:
    logits = torch.zeros(1, 8)
    logits[0, :4] = torch.tensor([2.0, 2.0, -2.0, 1.0])
    one = state(temperature=0.0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    one.append(3)
    one.append(3)
    sample(logits, [one])
    assert logits[0, :4].tolist() == [2.0, 1.0, -4.0, 0.5 - 0.5 - 2 * 0.25]


def test_logits_made_in_inference_mode_can_be_penalised() -> None:
    with torch.inference_mode():
        logits = torch.zeros(1, 8)
    one = state(temperature=0.0, presence_penalty=1.0)
    one.append(0)
    assert sample(logits, [one]).token_ids.tolist() == [1]


def test_penalties_follow_the_tokens_as_they_come() -> None:
    rng = np.random.default_rng(0)
    settings = {"repetition_penalty": 1.7, "presence_penalty": 0.3, "frequency_penalty": 0.2}
    one, answer = state(temperature=0.0, **settings), list[int]()
    for token_id in rng.integers(0, 300, 400).tolist():
        logits = torch.from_numpy(rng.standard_normal((1, 300), dtype=np.float32))
        expected = logits[0].clone()
        seen = sorted({1, 2, *answer})
        expected[seen] = torch.where(expected[seen] > 0, expected[seen] / 1.7, expected[seen] * 1.7)
        for other, count in Counter(answer).items():
            expected[other] -= 0.3 + 0.2 * count
        sample(logits, [one])
        torch.testing.assert_close(logits[0], expected)
        answer.append(token_id)
        one.append(token_id)


def test_a_long_prompt_is_looked_at_once_for_the_repetition_penalty() -> None:
    class Prompt(list[int]):
        num_reads = 0

        def __iter__(self) -> Iterator[int]:
            self.num_reads += 1
            return super().__iter__()

    prompt = Prompt(range(5000))
    params = SamplingParams(repetition_penalty=1.5)
    one = SamplingState(params, 0, prompt_token_ids=prompt, banned_until_min_tokens=[])
    after_start = prompt.num_reads
    for token_id in range(20):
        sample(torch.zeros(1, 6000), [one])
        one.append(token_id)
    assert prompt.num_reads == after_start


def test_logit_bias_is_added() -> None:
    logits = torch.zeros(1, 8)
    sample(logits, [state(logit_bias={3: 2.5, 5: -100.0})])
    assert logits[0].tolist() == [0, 0, 0, 2.5, 0, -100.0, 0, 0]
    assert draws(torch.zeros(8), 50, logit_bias={6: 100.0}) == {6: 50}


@pytest.mark.parametrize("vocab_size", [200, VOCAB])
@pytest.mark.parametrize("typical_p", [0.2, 0.6, 0.95])
def test_typical_p_keeps_what_is_nearest_to_the_expected_surprise(vocab_size: int, typical_p: float) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(vocab_size, generator=generator, dtype=torch.float64) * 2
    probs = torch.softmax(logits, -1).tolist()
    entropy = -sum(p * math.log(p) for p in probs)
    kept, mass = set(), 0.0
    for token_id in sorted(range(vocab_size), key=lambda i: abs(-math.log(probs[i]) - entropy)):
        kept.add(token_id)
        mass += probs[token_id]
        if mass >= typical_p:
            break
    seen = set(draws(logits.float(), 400, typical_p=typical_p))
    assert seen <= kept
    assert len(seen) > 0.3 * min(len(kept), 400)


def test_typical_p_looks_at_what_top_k_left() -> None:
    logits = torch.tensor([5.0, 1.0, 0.9, 0.8, 0.7, -9.0])
    assert set(draws(logits, 200, top_k=4, typical_p=0.999, temperature=3.0)) <= {0, 1, 2, 3}


def test_uniform_numbers_are_uniform_and_repeatable() -> None:
    values = np.array([uniform(seed, index) for seed in range(100) for index in range(50)])
    assert values.min() >= 0
    assert values.max() < 1
    assert values.mean() == pytest.approx(0.5, abs=0.02)
    assert len(set(values.tolist())) == len(values)
    assert uniform(-5, 3) == uniform(-5, 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 1},
        {"temperature": 1.0},
        {"top_p": 0.5, "top_k": 4},
    ],
)
@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [math.nan, -math.inf], [-math.inf] * VOCAB])
def test_a_row_that_is_not_finite_is_told_and_others_are_chosen(
    settings: dict[str, object], bad: list[float]
) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(5))
    states = [state(seed=seed, **settings) for seed in range(3)]
    expected = sample(logits.clone(), states)
    assert expected.is_finite.tolist() == [True] * 3
    logits[1, : len(bad)] = torch.tensor(bad)
    sampled = sample(logits, states)
    assert sampled.is_finite.tolist() == [True, False, True]
    assert sampled.token_ids[[0, 2]].tolist() == expected.token_ids[[0, 2]].tolist()


def test_a_row_with_tokens_that_cannot_come_is_finite() -> None:
    logits = torch.zeros(1, 8)
    logits[0, 1:5] = -math.inf
    for settings in ({"temperature": 0.0}, {"temperature": 1.0}):
        assert sample(logits.clone(), [state(**settings)]).is_finite.tolist() == [True]


def test_the_lowest_temperature_takes_the_likeliest() -> None:
    logits = torch.tensor([[30.0, 31.0, -20.0, 31.0 - 1e-3]])
    for temperature in (1e-6, 1e-30, 1e-300):
        assert sample(logits.clone(), [state(temperature=temperature)]).token_ids.tolist() == [1]
