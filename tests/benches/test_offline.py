"""Turns of the offline workload: which are counted, and what they are compared with."""

from pathlib import Path
from typing import Any

import offline
import pytest
from engines import PRECISIONS, Loraserve
from workloads import Workload

SETTINGS = offline.OfflineSettings(
    workload=Workload(num_requests=1, prompt_tokens=1, new_tokens=100),
    distinct=[0],
    rank=16,
    precision=PRECISIONS["bf16"],
    repeats=2,
    long_turn_s=10.0,
    with_transformers=False,
    peers=[],
    venvs=Path(),
    threads=1,
)


class FakeEngine:
    """Answers at given rates, one after the other."""

    def __init__(self, name: str, rates: list[float]) -> None:
        self.name = name
        self.settings: dict[str, Any] = {}
        self._rates = iter(rates)

    def batch(self) -> float:
        return next(self._rates)

    def stream(self) -> float:
        return 7.0

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("machine.busy_percent", lambda: 0.0)


def test_the_first_turn_warms_up_unless_it_is_long() -> None:
    engines = [FakeEngine("loraserve", [1.0e3, 20.0, 30.0]), FakeEngine("slow", [9.0])]
    result = offline.alternate(engines, 0, SETTINGS)
    assert result["rates"] == {"loraserve": [20.0, 30.0], "slow": [9.0]}
    assert result["inter_token_ms"] == {"loraserve": 7.0, "slow": 7.0}


def test_streams_are_measured_on_the_base_model_only() -> None:
    assert offline.alternate([FakeEngine("loraserve", [20.0] * 3)], 8, SETTINGS)["inter_token_ms"] == {}


def test_ratios_take_the_better_of_loraserves_weights() -> None:
    results = [
        {"distinct": 0, "medians": {"loraserve, int8": 8.0, "loraserve, Q8_0 file": 10.0, "peer": 4.0}},
        {"distinct": 32, "medians": {"loraserve, int8": 5.0, "loraserve, Q8_0 file": 4.0, "peer": 1.0}},
    ]
    base, many = offline.with_ratios(results)
    assert base["over_peer"] == {"peer": 2.5}
    assert many["over_peer"] == {"peer": 5.0}
    assert (base["over_own_base"], many["over_own_base"]) == (1.0, 0.5)


def test_quantised_precisions_have_a_name_of_their_own() -> None:
    assert [name for name, one in PRECISIONS.items() if one.is_quantized] == ["int8", "int4", "int4-k"]
    assert offline.is_ours(Loraserve.name)
