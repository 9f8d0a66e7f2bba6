"""Costs in files, fits, and costs of other models."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from loraserve.config import EngineConfig
from loraserve.engine.step_log import StepRecord
from loraserve.errors import InvalidRequestError
from loraserve.planning.costs import Costs, LoadCosts, StepCosts, read_costs
from loraserve.planning.fit import fit, nnls
from loraserve.planning.hardware import hardware, names
from loraserve.planning.models import planned_model
from loraserve.planning.scaling import costs_on

from tests.planning.costs import COSTS


def test_costs_come_back_from_their_file(tmp_path: Path) -> None:
    COSTS.write(tmp_path / "costs.json")
    assert read_costs(tmp_path / "costs.json") == COSTS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("steps"), "holds no costs: 'steps'"),
        (lambda values: values.pop("amounts"), "holds no costs: 'amounts'"),
        (lambda values: values.update(colour="red"), "unknown fields colour"),
        (lambda values: values["steps"].update(sample=-1.0), "the cost of sample is -1.0"),
        (lambda values: values["steps"].update(rows=[]), "must be a list of 1 to"),
        (lambda values: values["steps"].update(rows=[[1, 2, 3]]), "it must be [rows, seconds]"),
        (lambda values: values["steps"].update(rows=[["a", 1]]), "the rows of a cost is 'a'"),
        (lambda values: values["loads"].update(bytes_per_s=0), "bytes_per_s is 0"),
        (lambda values: values["loads"].update(lanes=0), "lanes is 0"),
        (lambda values: values["amounts"].update(kv_nbytes=0), "kv_nbytes is 0"),
        (lambda values: values.update(steps=3), "holds no costs"),
    ],
)
def test_a_file_without_costs_is_refused(tmp_path: Path, change: object, message: str) -> None:
    values = json.loads(json.dumps(dataclasses.asdict(COSTS)))
    change(values)  # type: ignore[operator]
    (tmp_path / "costs.json").write_text(json.dumps(values))
    with pytest.raises(InvalidRequestError) as refused:
        read_costs(tmp_path / "costs.json")
    assert message in str(refused.value)


def test_nnls_finds_what_is_not_negative() -> None:
    random = np.random.RandomState(0)
    matrix = random.random_sample((200, 6)) * [1, 1e-6, 1e6, 1, 1, 1]
    truth = np.array([1.0, 3e6, 2e-6, 0.0, 0.5, 0.0])
    assert nnls(matrix, matrix @ truth) == pytest.approx(truth, rel=1e-6, abs=1e-9)
    noisy = nnls(matrix, matrix @ truth - 0.3 * matrix[:, 3])
    assert (noisy >= 0).all()
    # No other point that is not negative is nearer.
    error = np.linalg.norm(matrix @ noisy - matrix @ truth + 0.3 * matrix[:, 3])
    for _ in range(200):
        other = np.maximum(noisy * (1 + 0.1 * random.randn(6)), 0)
        assert np.linalg.norm(matrix @ other - matrix @ truth + 0.3 * matrix[:, 3]) >= error - 1e-9


def records(count: int = 400, seed: int = 0) -> list[StepRecord]:
    """Steps that take what known costs say, every fiftieth much longer."""
    random = np.random.RandomState(seed)
    found = []
    for index in range(count):
        rows = float(random.choice([1, 2, 4, 8, 16, 32, 64, 200, 700]))
        amounts = {
            "rows": rows,
            "samples": min(rows, 32.0),
            "prompt_pairs": 0.0 if rows <= 64 else rows * float(random.randint(50, 700)),
            "context_tokens": rows * float(random.randint(10, 500)),
            "adapter_rows": float(random.choice([0, rows])),
            "segments": float(random.randint(0, 5)),
            "adapter_nbytes": float(random.randint(0, 5)) * 5e6,
            "loads": float(random.randint(0, 3)),
        }
        seconds = 5e-3 + 2e-4 * rows + 1e-8 * amounts["context_tokens"] + 1e-10 * amounts["adapter_nbytes"]
        seconds += 3e-8 * amounts["prompt_pairs"]
        seconds *= 20 if index % 50 == 7 else 1 + 0.02 * random.randn()
        found.append(StepRecord(seconds=seconds, **amounts))
    return found


def test_a_fit_finds_the_costs_that_steps_were_made_with() -> None:
    fitted = fit(records())
    assert fitted.num_outliers == 8
    assert fitted.error < 0.03
    assert abs(fitted.total_error) < 0.01
    assert fitted.costs.adapter_byte == pytest.approx(1e-10, rel=0.1)
    assert fitted.costs.prompt_pair == pytest.approx(3e-8, rel=0.2)
    first, last = fitted.costs.rows[0], fitted.costs.rows[-1]
    assert first == pytest.approx((1.0, 5.2e-3), rel=0.05)
    assert last[0] == 700


def test_all_steps_together_take_what_they_took() -> None:
    """Those too that something else has made longer."""
    made = records()
    plain, whole = fit(made).costs, fit(made, keep_sum=True).costs
    factor = whole.adapter_byte / plain.adapter_byte
    assert 1.2 < factor < 1.6  # a fiftieth of the steps took twenty times as long
    assert whole.rows[-1][1] == pytest.approx(plain.rows[-1][1] * factor)


def test_lines_have_enough_steps() -> None:
    """One long step gives no slope of its own to what lies beyond."""
    usual = [record for record in records() if record.rows <= 64]
    odd = dataclasses.replace(usual[0], rows=300.0, seconds=9.0)
    (_, *_, (last, seconds)) = fit([*usual, odd]).costs.rows
    assert last == 300.0
    assert seconds < 0.2


def test_a_fit_of_few_steps_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="10 steps were logged, a fit needs at least 30"):
        fit(records(10))


def test_known_hardware_has_costs() -> None:
    for name in names():
        if name != "this":
            assert hardware(name).costs.steps.rows


def test_costs_of_the_measured_model_are_as_measured() -> None:
    h100 = hardware("h100")
    assert costs_on(planned_model(EngineConfig(model="llama-3-8b")), h100) == h100.costs


def test_costs_grow_with_the_model_and_shrink_with_bandwidth() -> None:
    large, small = (planned_model(EngineConfig(model=name)) for name in ("llama-3-70b", "llama-3.2-1b"))
    h100, l4 = hardware("h100"), hardware("l4")
    of_large, of_small = costs_on(large, h100), costs_on(small, h100)
    assert (of_large.kind, of_small.kind) == ("scaled", "scaled")
    assert (of_large.error, of_large.total_error) == (None, None)  # of another model's steps
    weights = large.read_nbytes / small.read_nbytes
    assert 0.3 * weights < of_large.steps.rows[0][1] / of_small.steps.rows[0][1] < weights
    on_l4 = costs_on(planned_model(EngineConfig(model="llama-3-8b")), l4)
    assert on_l4.kind == "roofline"
    ratio = on_l4.steps.rows[0][1] / h100.costs.steps.rows[0][1]
    assert 0.5 * 3.007 / 0.3 < ratio < 3.007 / 0.3
    assert on_l4.steps.adapter_byte == pytest.approx(h100.costs.steps.adapter_byte * 3.007 / 0.3)


def test_hardware_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    values = {"device": "cuda", "memory": "48GiB", "read_gb_per_s": 900, "tflop_per_s": 180, "like": "h100"}
    path.write_text(json.dumps(values))
    found = hardware(str(path))
    assert (found.name, found.memory_nbytes, found.read_bytes_per_s) == ("card", 48 * 2**30, 9e11)
    path.write_text(json.dumps({**values, "like": None, "costs": dataclasses.asdict(COSTS)}))
    assert hardware(str(path)).costs == COSTS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": "cpu", "memory": 1, "read_gb_per_s": 0}, "read_gb_per_s is 0"),
        ({"device": "cpu", "read_gb_per_s": 1, "tflop_per_s": 1}, "memory is 0"),
        (
            {"device": "cpu", "memory": 5, "read_gb_per_s": 1, "tflop_per_s": 1, "like": "b200"},
            "like is 'b200'",
        ),
        ({"speed": 1}, "unknown fields speed"),
    ],
)
def test_a_file_that_describes_no_hardware_is_refused(
    tmp_path: Path, values: dict[str, object], message: str
) -> None:
    path = tmp_path / "card.json"
    path.write_text(json.dumps(values))
    with pytest.raises(InvalidRequestError) as refused:
        hardware(str(path))
    assert message in str(refused.value)


def test_unknown_hardware_is_refused_with_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequestError, match="'h1000' is not known, give h100, h200"):
        hardware("h1000")
    monkeypatch.setenv("LORASERVE_CACHE_DIR", str(tmp_path))
    with pytest.raises(InvalidRequestError, match="nothing was measured on this machine"):
        hardware("this")
    COSTS.write(tmp_path / "costs.json")
    assert hardware("this").costs == COSTS


def test_costs_that_are_no_times_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="latency_s is nan"):
        LoadCosts(latency_s=float("nan"), bytes_per_s=1.0)
    with pytest.raises(InvalidRequestError, match="the cost of load is inf"):
        StepCosts(rows=((1, 1),), load=float("inf"))
    assert isinstance(COSTS, Costs)
