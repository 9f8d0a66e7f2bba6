"""The sampler alone: its distribution, its truncations against plain definitions, its row independence."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import transformers
from loraserve import _core
from loraserve.models.ops import ReadyRows
from loraserve.sampling.sampler import Sampled, Sampler
from loraserve.sampling_params import SamplingParams

VOCAB = 4000
HOST = _core.HostSampler(num_threads=2)


@dataclass
class State:
    """A sequence, its prompt 1, 2 and its end token 0; `index` tokens were drawn of it."""

    params: SamplingParams
    seed: int
    index: int
    answer: list[int] = field(default_factory=list)


def state(seed: int = 0, index: int = 0, answer: Sequence[int] = (), **settings: object) -> State:
    return State(SamplingParams(max_tokens=100, **settings), seed, index, list(answer))


def make_sampler() -> Sampler:
    def choose(logits: torch.Tensor, arrays: _core.SampleArrays) -> ReadyRows:
        return ReadyRows(HOST.sample(logits.data_ptr(), *logits.shape, arrays))

    return Sampler(choose)


def sample(logits: torch.Tensor, states: Sequence[State]) -> Sampled:
    sampler, before = make_sampler(), logits.clone()
    for request_id, one in enumerate(states):
        sampler.add(request_id, one.params, one.seed, [1, 2], [0])
        for _ in range(one.index):
            sampler._sequences.draw([request_id], logits.shape[1])
        for token_id in one.answer:
            sampler.append([request_id], [token_id])
    sampled = sampler.sample(logits, range(len(states))).result()
    assert torch.equal(logits.view(torch.int32), before.view(torch.int32))
    return sampled


def draws(logits: torch.Tensor, count: int, **settings: object) -> Counter[int]:
    rows = logits.repeat(count, 1)
    return Counter(sample(rows, [state(seed, **settings) for seed in range(count)]).token_ids.tolist())


def assert_draws_as(
    changed: torch.Tensor, logits: torch.Tensor, answer: Sequence[int] = (), **settings: object
) -> None:
    """What draws for `logits` with these settings gives is what draws for the changed logits give."""
    for temperature in (0.0, 1.0, 1.5):
        drawn = len(answer)
        states = [state(seed, drawn, answer, temperature=temperature, **settings) for seed in range(300)]
        plain = [state(seed, drawn, temperature=temperature) for seed in range(300)]
        actual = sample(logits.repeat(300, 1), states).token_ids
        assert actual.tolist() == sample(changed.repeat(300, 1), plain).token_ids.tolist()


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
    sampled = sample(logits, states)
    assert sampled.token_ids.tolist() == [likeliest[0], 5, *likeliest[2:]]
    assert list(sampled.logprobs) == [3]


def test_penalties_change_logits_as_defined() -> None:
    logits = torch.zeros(8)
    logits[:4] = torch.tensor([2.0, 2.0, -2.0, 1.0])
    changed = logits.clone()
    changed[:4] = torch.tensor([2.0, 1.0, -4.0, 0.5 - 0.5 - 2 * 0.25])
    penalties = {"repetition_penalty": 2.0, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    assert_draws_as(changed, logits, answer=[3, 3], **penalties)


def test_logits_made_in_inference_mode_can_be_penalised() -> None:
    with torch.inference_mode():
        logits = torch.zeros(1, 8)
    one = state(temperature=0.0, presence_penalty=1.0, answer=[0])
    assert sample(logits, [one]).token_ids.tolist() == [1]


def test_penalties_follow_the_tokens_as_they_come() -> None:
    rng = np.random.default_rng(0)
    settings = {"repetition_penalty": 1.7, "presence_penalty": 0.3, "frequency_penalty": 0.2}
    sampler = make_sampler()
    sampler.add(0, SamplingParams(temperature=0.0, **settings), 0, [1, 2], [])
    answer: list[int] = []
    for token_id in rng.integers(0, 300, 400).tolist():
        logits = torch.from_numpy(rng.standard_normal((1, 300), dtype=np.float32))
        expected = logits[0].clone()
        seen = sorted({1, 2, *answer})
        expected[seen] = torch.where(expected[seen] > 0, expected[seen] / 1.7, expected[seen] * 1.7)
        for other, count in Counter(answer).items():
            expected[other] -= 0.3 + 0.2 * count
        assert sampler.sample(logits, [0]).result().token_ids.tolist() == [int(expected.argmax())]
        answer.append(token_id)
        sampler.append([0], [token_id])


def test_a_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(6)) * 3
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    changed = processor(torch.tensor([[1, 2, 9, 200, 9]]), logits[None].clone())[0]
    assert_draws_as(changed, logits, answer=[9, 200, 9], repetition_penalty=1.7)


def test_a_long_prompt_is_looked_at_once_for_the_repetition_penalty() -> None:
    class Prompt(list[int]):
        num_reads = 0

        def __iter__(self) -> Iterator[int]:
            self.num_reads += 1
            return super().__iter__()

    prompt = Prompt(range(5000))
    sampler = make_sampler()
    sampler.add(0, SamplingParams(repetition_penalty=1.5), 0, prompt, [])
    after_start = prompt.num_reads
    for token_id in range(20):
        sampler.sample(torch.zeros(1, 6000), [0])
        sampler.append([0], [token_id])
    assert prompt.num_reads == after_start


def test_logit_bias_is_added() -> None:
    changed = torch.tensor([0, 0, 0, 2.5, 0, -100.0, 0, 0])
    assert_draws_as(changed, torch.zeros(8), logit_bias={3: 2.5, 5: -100.0})
    assert draws(torch.zeros(8), 50, logit_bias={6: 100.0}) == {6: 50}


def test_end_tokens_come_after_min_tokens_alone() -> None:
    logits = torch.zeros(1, 8)
    logits[0, 0] = 9.0
    early, late = (state(index=index, temperature=0.0, min_tokens=2) for index in (1, 2))
    assert sample(logits.repeat(2, 1), [early, late]).token_ids.tolist() == [1, 0]


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


WARPERS = {
    "top_k": transformers.TopKLogitsWarper,
    "top_p": transformers.TopPLogitsWarper,
    "min_p": transformers.MinPLogitsWarper,
    "typical_p": transformers.TypicalLogitsWarper,
}


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"typical_p": 0.6},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
        {"temperature": 1.4, "top_p": 0.9, "min_p": 0.05},
        {"top_k": 50, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9},
    ],
)
def test_distributions_are_those_of_transformers(settings: dict[str, float]) -> None:
    logits = torch.randn(200, generator=torch.Generator().manual_seed(7)) * 2
    scores = logits[None] / settings.get("temperature", 1.0)
    for name, warper in WARPERS.items():
        if name in settings:
            scores = warper(settings[name])(None, scores)
    expected = torch.softmax(scores[0], -1).tolist()
    counts = draws(logits, 6000, **settings)
    assert all(expected[token_id] > 0 for token_id in counts)
    assert sum(abs(counts[token_id] / 6000 - p) for token_id, p in enumerate(expected)) / 2 < 0.06


def test_draws_are_uniform_and_depend_on_seed_and_index_alone() -> None:
    logits = torch.zeros(1, 1000)
    states = [state(seed, index) for seed in range(100) for index in range(20)]
    token_ids = sample(logits.repeat(2000, 1), states).token_ids
    assert token_ids.mean() == pytest.approx(499.5, abs=20)
    assert np.bincount(token_ids // 100, minlength=10).min() > 150
    assert len(set(token_ids.tolist())) > 800
    for seed in (-5, 2**63 - 1):
        token_id = sample(logits, [state(seed, 3)]).token_ids.tolist()
        assert token_id == sample(logits.repeat(2, 1), [state(seed, 3)] * 2).token_ids.tolist()[:1]


def test_nothing_is_drawn_ahead_of_what_the_last_token_changes() -> None:
    sampler = make_sampler()
    changing = {"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": 0.1}
    for request_id, settings in enumerate([{}, {"top_p": 0.5, "min_tokens": 5}, *changing]):
        sampler.add(request_id, SamplingParams(max_tokens=9, **settings), 0, [1], [0])
    assert [sampler.depend_on_last_token([request_id]) for request_id in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert sampler.depend_on_last_token([0, 1, 3])
    assert not sampler.depend_on_last_token([0, 99])


def test_a_sequence_is_forgotten() -> None:
    sampler = make_sampler()
    sampler.add(5, SamplingParams(), 0, [1], [])
    sampler.append([5], [3])
    assert sampler.num_output_tokens(5) == 1
    sampler.remove(5)
    sampler.remove(5)
    assert sampler.num_output_tokens(5) is None
    with pytest.raises(KeyError, match="5"):
        sampler.sample(torch.zeros(1, 8), [5])
    with pytest.raises(KeyError, match="5"):
        sampler.append([5], [3])


def test_logprobs_are_those_of_torch() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(8)) * 4
    expected = torch.log_softmax(logits, -1)
    sampled = sample(logits, [state(seed, logprobs=seed * 5) for seed in range(4)])
    for row, token_id in enumerate(sampled.token_ids.tolist()):
        entry = sampled.logprobs[row][0]
        values, ids = expected[row].topk(5 * row)
        assert (entry.token_id, [id_ for id_, _ in entry.top]) == (token_id, ids.tolist())
        assert entry.logprob == pytest.approx(float(expected[row, token_id]), abs=1e-5)
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_logits_that_do_not_fit_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits are \(1, 7\), the rows to sample are \(1, 8\)"):
        HOST.sample(0, 1, 7, draw_one(8))


def draw_one(vocab_size: int) -> _core.SampleArrays:
    sequences = _core.Sampler()
    sequences.add(0)
    return sequences.draw([0], vocab_size)


def test_masks_and_biases_of_another_length_are_refused() -> None:
    sequences = _core.Sampler()
    with pytest.raises(ValueError, match="there are 1 biases for 2 tokens"):
        sequences.add(0, biased_ids=[1, 2], biases=[0.5])
    sequences.add(0)
    with pytest.raises(ValueError, match="a mask has 1 words, not 2"):
        sequences.draw([0], 33, [np.zeros(1, dtype=np.uint32)], [0])


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


def test_rows_behind_guesses_are_those_of_one_token_after_another() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(9)) * 2
    params = SamplingParams(
        temperature=0.9, seed=4, repetition_penalty=1.4, frequency_penalty=0.5, logprobs=2
    )

    def new() -> Sampler:
        sampler = make_sampler()
        sampler.add(0, params, 4, [1, 2], [])
        return sampler

    plain, expected = new(), []
    for row in range(len(logits)):
        sampled = plain.sample(logits[row : row + 1], [0]).result()
        expected.append((int(sampled.token_ids[0]), sampled.logprobs[0][0]))
        plain.append([0], [expected[-1][0]])
    token_ids = [token_id for token_id, _ in expected]
    guessing = new()
    sampled = guessing.sample(logits, [0] * 4, [*token_ids[:3], -1]).result()
    assert sampled.token_ids.tolist() == token_ids
    assert sampled.logprobs == {0: [logprob for _, logprob in expected]}
    # The second guess is wrong: only two tokens come of the step, and the next is as it is without.
    guessing = new()
    wrong = (token_ids[1] + 1) % VOCAB
    sampled = guessing.sample(logits, [0] * 4, [token_ids[0], wrong, token_ids[2], -1]).result()
    assert sampled.token_ids[:2].tolist() == token_ids[:2]
    guessing.append([0, 0], token_ids[:2])
    assert guessing.sample(logits[2:3], [0]).result().token_ids.tolist() == token_ids[2:3]
