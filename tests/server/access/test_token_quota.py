"""Tokens a minute of a key, on a clock that the test turns."""

from __future__ import annotations

from typing import Any, cast

import pytest
from loraserve.engine.prepared import PreparedRequest
from loraserve.errors import InvalidRequestError, OverloadedError
from loraserve.pooling.params import PoolingParams
from loraserve.request import GenerateRequest
from loraserve.sampling_params import SamplingParams
from loraserve.server.access.token_quota import TokenQuota

MAX_MODEL_LEN = 50


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def request(
    prompt: int, max_tokens: int | None, n: int = 1, min_tokens: int = 0, *, pools: bool = False
) -> PreparedRequest:
    pooling = PoolingParams(task="embed") if pools else None
    return PreparedRequest(
        GenerateRequest(prompt=[1], pooling=pooling),
        [1] * prompt,
        [],
        SamplingParams(max_tokens=max_tokens, n=n, min_tokens=min_tokens),
        tokenizer=cast(Any, None),
        arrived_at=0.0,
        deadline_s=None,
        registered={},
    )


def test_what_a_call_did_not_use_is_given_back_and_a_minute_brings_the_rest() -> None:
    clock = Clock()
    quota = TokenQuota("k", 60, clock)
    _, reserved = quota.reserve([request(10, 20), request(5, 5)], MAX_MODEL_LEN)
    assert reserved.num_tokens == 40
    with pytest.raises(
        OverloadedError, match="has 20 of its 60 tokens .* may take 21, try again in 1.0 s"
    ) as e:
        quota.reserve([request(11, 10)], MAX_MODEL_LEN)
    assert e.value.retry_after_s == pytest.approx(1.0)
    reserved.settle(25)
    reserved.settle(0)  # nothing comes twice
    quota.reserve([request(15, 20)], MAX_MODEL_LEN)
    clock.now += 30
    quota.reserve([request(10, 20)], MAX_MODEL_LEN)
    clock.now += 1000
    quota.reserve([request(30, 30)], MAX_MODEL_LEN)
    with pytest.raises(OverloadedError):
        quota.reserve([request(1, 1)], MAX_MODEL_LEN)


def test_answers_without_a_length_may_have_what_is_left_within_the_context() -> None:
    quota = TokenQuota("k", 60)
    bounded, reserved = quota.reserve([request(10, None, n=2)], MAX_MODEL_LEN)
    assert (bounded[0].params.max_tokens, reserved.num_tokens) == (25, 60)
    with pytest.raises(OverloadedError):
        quota.reserve([request(1, None)], MAX_MODEL_LEN)
    reserved.settle(0)
    bounded, reserved = quota.reserve([request(20, None), request(3, 4)], MAX_MODEL_LEN)
    assert [one.params.max_tokens for one in bounded] == [30, 4]
    assert reserved.num_tokens == 57


def test_each_answer_counts_and_a_pooled_prompt_alone() -> None:
    quota = TokenQuota("k", 1000)
    assert quota.reserve([request(10, 20, n=3)], MAX_MODEL_LEN)[1].num_tokens == 70
    assert quota.reserve([request(10, 20, pools=True)], MAX_MODEL_LEN)[1].num_tokens == 10


def test_what_no_minute_has_is_refused_for_good_and_nothing_taken() -> None:
    quota = TokenQuota("k", 60)
    with pytest.raises(InvalidRequestError, match="may take 61 tokens .* 'k' has 60 a minute"):
        quota.reserve([request(41, 20)], MAX_MODEL_LEN)
    with pytest.raises(InvalidRequestError, match="may take 61 tokens"):
        quota.reserve([request(31, None, min_tokens=30)], MAX_MODEL_LEN)
    assert quota.reserve([request(40, 20)], MAX_MODEL_LEN)[1].num_tokens == 60
