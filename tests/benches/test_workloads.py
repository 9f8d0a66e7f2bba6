"""The generators draw what the papers say: exact shares, sizes and moments."""

import itertools
import math
from collections import Counter
from statistics import fmean, median, pstdev

import numpy as np
import pytest
import workloads


@pytest.mark.parametrize(("alpha", "top_share"), [(0.1, 0.59), (0.3, 0.20), (0.6, 0.04), (1.0, 0.005)])
def test_the_most_popular_of_200_slora_adapters_has_the_papers_share(alpha: float, top_share: float) -> None:
    requests = workloads.slora(200, 1000, duration_s=100, alpha=alpha)
    counts = Counter(request.adapter for request in requests)
    assert counts[0] / len(requests) == pytest.approx(top_share, rel=0.05, abs=0.005)
    assert max(counts) <= 199


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_every_slora_adapter_has_the_share_of_the_power_law(alpha: float) -> None:
    n, num_requests = 10, 200_000
    counts = Counter(
        request.adapter for request in workloads.slora(n, num_requests, duration_s=1, alpha=alpha)
    )
    for i in range(n):
        share = ((i + 1) / n) ** alpha - (i / n) ** alpha
        assert counts[i] / num_requests == pytest.approx(share, abs=5 * math.sqrt(share / num_requests))


def test_slora_draws_the_numbers_of_its_own_generator() -> None:
    random = np.random.RandomState(42)
    adapters = (random.power(0.3, 12) * 50).astype(int)
    prompts, answers = random.randint(8, 512, 12), random.randint(8, 512, 12)
    gaps = random.gamma(1 / 4, 4 / 3, 12)
    requests = workloads.slora(50, 3, duration_s=4, alpha=0.3, cv=2)
    assert [r.adapter for r in requests] == adapters.tolist()
    assert [(r.prompt_tokens, r.new_tokens) for r in requests] == list(zip(prompts, answers, strict=True))
    assert [r.arrival_s for r in requests] == pytest.approx(np.cumsum(gaps))


@pytest.mark.parametrize("cv", [1, 4, 8])
def test_gaps_have_the_mean_and_the_burstiness_asked_for(cv: float) -> None:
    requests = workloads.slora(10, 5, duration_s=40_000, cv=cv)
    arrivals = [0.0, *(request.arrival_s for request in requests)]
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    assert fmean(gaps) == pytest.approx(1 / 5, rel=0.05)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.1)


def test_lengths_are_uniform_from_8_to_511() -> None:
    requests = workloads.slora(10, 1000, duration_s=100)
    for lengths in ([r.prompt_tokens for r in requests], [r.new_tokens for r in requests]):
        assert (min(lengths), max(lengths)) == (8, 511)
        assert fmean(lengths) == pytest.approx(259.5, rel=0.01)


def test_zipf_shares_fall_by_the_exponent() -> None:
    requests = workloads.zipf(512, 1000, duration_s=300)
    counts = Counter(request.adapter for request in requests)
    shares = workloads.zipf_shares(512, 1.2)
    assert shares.sum() == pytest.approx(1)
    assert shares[0] / shares[9] == pytest.approx(10**1.2)
    for rank in (0, 1, 9, 99):
        expected = shares[rank]
        assert counts[rank] / len(requests) == pytest.approx(expected, abs=5 * math.sqrt(expected / 300_000))


@pytest.mark.parametrize(
    ("popularity", "batch_size", "sizes"),
    [
        ("distinct", 32, [1] * 32),
        ("identical", 32, [32]),
        ("skewed", 32, [1, 1, 2, 3, 5, 7, 11, 2]),
        ("skewed", 7, [1, 1, 2, 3]),
        ("uniform", 16, [4, 4, 4, 4]),
        ("uniform", 32, [5, 5, 6, 5, 5, 6]),
    ],
)
def test_punica_groups_have_the_papers_sizes(
    popularity: workloads.Popularity, batch_size: int, sizes: list[int]
) -> None:
    assert workloads.group_sizes(popularity, batch_size) == sizes
    requests = workloads.punica(popularity, 3 * batch_size, batch_size=batch_size)
    for start in range(0, 3 * batch_size, batch_size):
        counts = Counter(request.adapter for request in requests[start : start + batch_size])
        assert [counts[index] for index in range(len(sizes))] == sizes


def test_punica_lengths_follow_the_log_normal_and_the_limit() -> None:
    requests = workloads.punica("identical", 100_000)
    prompts = [request.prompt_tokens for request in requests]
    totals = [request.prompt_tokens + request.new_tokens for request in requests]
    assert min(prompts) == 1
    assert max(prompts) <= 2046
    assert median(prompts) == pytest.approx(17, abs=1)  # -1 + 18 e^0, rounded down
    assert np.percentile(prompts, 84.13) == pytest.approx(-1 + 18 * math.exp(0.8), abs=1.5)
    assert all(request.new_tokens >= 2 for request in requests)
    assert max(totals) <= 2048
    assert fmean(totals) == pytest.approx(1024, rel=0.02)


def test_vtc_clients_send_at_their_rates_and_pause_and_ramp() -> None:
    def arrivals(variant: workloads.Variant, client: int) -> list[float]:
        requests = workloads.vtc(variant)
        assert all((r.prompt_tokens, r.new_tokens) == (256, 256) for r in requests)
        assert requests == sorted(requests, key=lambda r: r.arrival_s)
        return [r.arrival_s for r in requests if r.adapter == client]

    assert (len(arrivals("steady", 0)), len(arrivals("steady", 1))) == (540, 1080)
    assert {int(moment // 60) for moment in arrivals("on-off", 0)} == {0, 2, 4}
    ramp = arrivals("ramp", 1)
    assert len(ramp) == 1080
    assert sum(moment < 180 for moment in ramp) == 270  # a quarter in the first half: the rate grows linearly


def test_a_seed_fixes_the_stream_and_its_prompts() -> None:
    once, again = (workloads.zipf(20, 5, duration_s=10, seed=7) for _ in range(2))
    assert once == again
    assert once != workloads.zipf(20, 5, duration_s=10, seed=8)
    texts = workloads.prompts(once)
    assert texts == workloads.prompts(again)
    assert [len(text) for text in texts] == [request.prompt_tokens for request in once]


def test_the_offline_batch_takes_turns_on_its_adapters() -> None:
    workload = workloads.Workload()
    assert [len(prompt) for prompt in workload.prompts()] == [128] * 32
    assert workload.adapters(0) == [None] * 32
    assert Counter(workload.adapters(8)) == {f"adapter-{i}": 4 for i in range(8)}
