"""A source that fails is left alone, tried by one at a time, and used again as soon as it answers."""

from __future__ import annotations

from loraserve.remote.breaker import (
    FIRST_PAUSE_S,
    MAX_FAILURES,
    MAX_PAUSE_S,
    TRIAL_RETRY_S,
    TRIAL_S,
    CircuitBreaker,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock) -> CircuitBreaker:
    breaker = CircuitBreaker(clock=clock)
    for _ in range(MAX_FAILURES):
        assert (breaker.wait_s(), breaker.is_open()) == (0.0, False)
        breaker.failed()
    return breaker


def test_after_some_failures_it_is_left_alone() -> None:
    clock = Clock()
    breaker = opened(clock)
    assert breaker.is_open()
    assert breaker.wait_s() == FIRST_PAUSE_S
    clock.now += FIRST_PAUSE_S - 0.5
    assert breaker.wait_s() == 0.5


def test_one_tries_and_others_come_back_soon() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += FIRST_PAUSE_S
    assert breaker.wait_s() == 0.0
    assert [breaker.wait_s() for _ in range(3)] == [TRIAL_RETRY_S] * 3
    breaker.succeeded()
    assert [breaker.wait_s() for _ in range(3)] == [0.0] * 3


def test_a_try_that_never_ends_is_not_the_last() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += FIRST_PAUSE_S
    assert breaker.wait_s() == 0.0
    clock.now += TRIAL_S
    assert breaker.wait_s() == 0.0


def test_pauses_double_up_to_a_bound() -> None:
    clock = Clock()
    breaker, pauses = opened(clock), []
    for _ in range(6):
        clock.now += breaker.wait_s()
        assert breaker.wait_s() == 0.0
        pauses.append(breaker.failed())
    assert pauses[:2] == [2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-2:] == [MAX_PAUSE_S, MAX_PAUSE_S]


def test_who_had_asked_before_and_fails_late_makes_no_pause_longer() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 0.5
    assert [breaker.failed() for _ in range(8)] == [FIRST_PAUSE_S - 0.5] * 8
    clock.now += FIRST_PAUSE_S
    breaker.succeeded()
    breaker.failed()
    assert breaker.wait_s() == 0.0


def test_a_source_says_when_to_come_back() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += FIRST_PAUSE_S
    assert breaker.failed(20.0) == 20.0
    assert breaker.wait_s() == 20.0
