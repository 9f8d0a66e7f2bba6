"""Rates and slots, on a clock that the test turns."""

import pytest
from loraserve.server.access.limits import ConcurrencyLimit, RateLimit


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("per_minute", "steps"),
    [
        # (seconds that pass, seconds to wait for the next request; 0 is admitted)
        (60.0, [(0, 0.0)] * 60 + [(0, 1.0), (0.5, 0.5), (0.5, 0.0), (0, 1.0)]),
        (2.0, [(0, 0.0), (0, 0.0), (0, 30.0), (10, 20.0), (20, 0.0)]),
        (1.0, [(0, 0.0), (59, 1.0), (1, 0.0)]),
        (0.5, [(0, 0.0), (0, 120.0), (120, 0.0)]),
        (60.0, [(3600, 0.0)] + [(0, 0.0)] * 59 + [(0, 1.0)]),
    ],
)
def test_a_bucket_refills_evenly_and_never_beyond_a_minute(
    per_minute: float, steps: list[tuple[float, float]]
) -> None:
    clock = Clock()
    limit = RateLimit(per_minute, clock)
    for passed, wait_s in steps:
        clock.now += passed
        assert limit.take() == pytest.approx(wait_s)


@pytest.mark.parametrize(
    ("limit", "num_running", "is_full"), [(None, 1000, False), (1, 0, False), (2, 2, True)]
)
def test_slots_are_full_at_their_limit(limit: int | None, num_running: int, is_full: bool) -> None:
    slots = ConcurrencyLimit(limit)
    for _ in range(num_running):
        slots.enter()
    assert slots.is_full is is_full


def test_leaving_frees_a_slot() -> None:
    slots = ConcurrencyLimit(1)
    slots.enter()
    slots.leave()
    assert not slots.is_full
