"""Workloads: drawn as their laws say, the same by seed; traces, and what is wrong with them."""

import json
from pathlib import Path

import numpy as np
import pytest
from loraserve.errors import InvalidRequestError
from loraserve.planning.workload import (
    BASE_MODEL,
    Lengths,
    Popularity,
    WorkloadSpec,
    read_trace,
)


def spec(**changes: object) -> WorkloadSpec:
    given = {
        "num_requests": 20_000,
        "rate": 50.0,
        "num_adapters": 100,
        "popularity": Popularity.parse("zipf:1.2"),
    }
    return WorkloadSpec(**{**given, **changes})  # type: ignore[arg-type]


def test_a_seed_gives_the_same_requests() -> None:
    for one, same in zip(
        spec().draw(8192).arrays().values(), spec().draw(8192).arrays().values(), strict=True
    ):
        assert np.array_equal(one, same)
    assert not np.array_equal(spec(seed=1).draw(8192).adapter, spec().draw(8192).adapter)


def test_arrivals_have_their_rate_and_burstiness() -> None:
    for cv in (0.0, 1.0, 3.0):
        gaps = np.diff(spec(cv=cv).draw(8192).at_s)
        assert gaps.mean() == pytest.approx(1 / 50, rel=0.1)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1, abs=1e-9)
    assert not spec(rate=0.0).draw(8192).at_s.any()


@pytest.mark.parametrize(
    ("law", "share_of_first"),
    [("uniform", 0.01), ("zipf:1.2", 0.2774), ("power:1", 0.01), ("power:0.3", 0.01**0.3)],
)
def test_the_most_popular_adapter_has_its_share(law: str, share_of_first: float) -> None:
    popularity = Popularity.parse(law)
    assert popularity.shares(100)[0] == pytest.approx(share_of_first, rel=1e-3)
    assert popularity.shares(100).sum() == pytest.approx(1)
    drawn = spec(popularity=popularity).draw(8192).adapter
    assert (drawn == 0).mean() == pytest.approx(share_of_first, rel=0.15)
    assert drawn.max() < 100


def test_requests_to_the_base_model_have_their_share() -> None:
    assert (spec(base_share=0.25).draw(8192).adapter == BASE_MODEL).mean() == pytest.approx(0.25, abs=0.02)
    assert (spec(popularity=Popularity.parse("base")).draw(8192).adapter == BASE_MODEL).all()


def test_lengths_are_within_the_context() -> None:
    lengths = Lengths.parse("prompt", "lognormal:200:1.5")
    drawn = spec(prompt=lengths, answer=Lengths.parse("answer", "8-256")).draw(1024)
    assert drawn.prompt_tokens.min() >= 1
    assert drawn.prompt_tokens.max() == 768
    assert np.median(drawn.prompt_tokens) == pytest.approx(200, rel=0.1)
    assert drawn.answer_tokens.max() == 256
    both = spec(prompt=lengths, answer=Lengths.parse("answer", "lognormal:100:2")).draw(1024)
    assert (both.prompt_tokens + both.answer_tokens).max() == 1024
    assert Lengths.parse("prompt", "10-30").mean == 20


def test_requests_are_as_long_as_they_are_said_to_be_or_refused() -> None:
    whole = spec(prompt=Lengths.parse("prompt", "1000"), answer=Lengths.parse("answer", "24"))
    assert set(whole.draw(1024).prompt_tokens) == {1000}
    assert set(whole.draw(1024).answer_tokens) == {24}
    with pytest.raises(InvalidRequestError, match="prompts of 1000 tokens and answers of 24 don't fit"):
        whole.draw(1023)
    with pytest.raises(InvalidRequestError, match="prompts of 2001 tokens"):
        spec(prefix_tokens=2000).draw(2000)


def test_prompts_are_longer_than_the_prefix_they_share() -> None:
    drawn = spec(prefix_tokens=300, num_prefixes=4).draw(8192)
    assert (drawn.prompt_tokens > drawn.prefix_tokens).all()
    assert set(drawn.prefix) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_requests": 0}, "requests is 0, it must be from 1"),
        ({"rate": -1.0}, "rate is -1.0, it must be in"),
        ({"cv": float("nan")}, "cv is nan, it must be a finite number"),
        ({"base_share": 2.0}, "base_share is 2.0, it must be in [0, 1]"),
        ({"num_adapters": 10**9}, "adapters is 1000000000, it must be from 0"),
        ({"seed": -1}, "seed is -1, it must be from 0"),
    ],
)
def test_a_workload_out_of_range_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        spec(**changes)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "text", ["", "zipf", "zipf:", "zipf:-1", "zipf:x", "uniform:2", "power:0", "pareto:1"]
)
def test_a_popularity_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="popularity"):
        Popularity.parse(text)


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "5-3", "x", "1-", "lognormal:5", "lognormal:0:1", "lognormal:1..2:1"]
)
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="prompt"):
        Lengths.parse("prompt", text)


def test_a_trace_is_read_as_it_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"at": 100.5, "adapter": "sql", "prompt_tokens": 10, "answer_tokens": 4},
        {"at": 101.0, "adapter": None, "prompt_tokens": 5, "answer_tokens": 1},
        {
            "at": 103.0,
            "adapter": "b",
            "prompt_tokens": 9,
            "answer_tokens": 2,
            "prefix": "s",
            "prefix_tokens": 8,
        },
        {"at": 103.0, "adapter": "sql", "prompt_tokens": 1, "answer_tokens": 1},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    trace = read_trace(path)
    assert trace.at_s.tolist() == [0.0, 0.5, 2.5, 2.5]
    assert trace.adapter.tolist() == [0, BASE_MODEL, 1, 0]
    assert trace.prompt_tokens.tolist() == [10, 5, 9, 1]
    assert trace.prefix_tokens.tolist() == [0, 0, 8, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no requests"),
        ("{", "line 1 is not JSON"),
        ("[]", "line 1: expected an object"),
        ('{"at": 0, "prompt_tokens": 1, "answer_tokens": 0}', "line 1: answer_tokens is 0"),
        ('{"at": "x", "prompt_tokens": 1, "answer_tokens": 1}', "line 1: at is 'x'"),
        ('{"at": 0, "adapter": 3, "prompt_tokens": 1, "answer_tokens": 1}', "adapter is 3"),
        ('{"at": 0, "prompt_tokens": 1, "answer_tokens": 1, "ttl": 1}', "unknown fields ttl"),
        ('{"at": 0, "prompt_tokens": 1, "answer_tokens": 1, "prefix_tokens": 2}', "prefix_tokens is 2"),
        (
            '{"at": 1, "prompt_tokens": 1, "answer_tokens": 1}\n'
            '{"at": 0, "prompt_tokens": 1, "answer_tokens": 1}',
            "line 2: at is 0 after 1, requests must be in order of their times",
        ),
        ('{"at": 0, "adapter": "' + "a" * 5000 + '"}', "line 1: the limits are"),
        ("[" * 3000, "line 1 is not JSON"),
        ('{"at": 0, "prompt_tokens": 1, "answer_tokens": 1}\n{"at" 1}', "line 2 is not JSON: .* column 7"),
        ('{"at": 0, "prompt_tokens": 1}', "line 1: answer_tokens is missing"),
    ],
)
def test_a_trace_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match=message):
        read_trace(path)


def test_a_trace_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="can't be read"):
        read_trace(tmp_path / "none.jsonl")
