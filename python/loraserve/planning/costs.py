"""`Costs`: how long steps and loads take on some hardware with some model, and what that rests on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from loraserve.errors import InvalidRequestError, ModelError
from loraserve.validation.files import replace_file
from loraserve.validation.json_file import read_json
from loraserve.validation.values import check_float, check_int

MAX_POINTS = 1024
MAX_SECONDS = 1e6
REST_S = 0.008 / 2**19  # of a load beside a step on the same cores, a byte (engine/extent_loader.py)
MAX_OPEN_AT_REST = 4


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Seconds of a step, a sum over its amounts of work (`engine/step_log.py`).

    Args:
        rows: (rows, seconds), ascending, of which the cost of the step's rows is interpolated.
        sample, prompt_pair, context_token, adapter_byte, adapter_row, segment, load: of one each.
        any_adapter: of a step with an adapter.
    """

    rows: tuple[tuple[float, float], ...]
    sample: float = 0.0
    prompt_pair: float = 0.0
    context_token: float = 0.0
    any_adapter: float = 0.0
    adapter_byte: float = 0.0
    adapter_row: float = 0.0
    segment: float = 0.0
    load: float = 0.0

    def __post_init__(self) -> None:
        for term in fields(self)[1:]:
            check_float(f"the cost of {term.name}", getattr(self, term.name), 0.0, MAX_SECONDS)
        if not isinstance(self.rows, Sequence) or not 1 <= len(self.rows) <= MAX_POINTS:
            raise InvalidRequestError(f"the costs of rows must be a list of 1 to {MAX_POINTS} points")
        for point in self.rows:
            if not isinstance(point, Sequence) or len(point) != 2:
                raise InvalidRequestError(f"a cost of rows is {point!r:.100}, it must be [rows, seconds]")
            check_float("the rows of a cost", point[0], 0.0, 1e9)
            check_float("the seconds of a cost of rows", point[1], 0.0, MAX_SECONDS)
        object.__setattr__(self, "rows", tuple((float(x), float(y)) for x, y in self.rows))


@dataclass(frozen=True, kw_only=True)
class LoadCosts:
    """Seconds of an adapter's way into the pool: `latency_s` + bytes / `bytes_per_s` of one of `lanes`.

    Beside steps on the same cores it rests `rest_s_per_byte` more, shared by the open loads; where more than
    `max_open_at_rest` are open, none does.
    """

    lanes: int = 2
    latency_s: float
    bytes_per_s: float
    rest_s_per_byte: float = 0.0
    max_open_at_rest: int = 0

    def __post_init__(self) -> None:
        check_int("lanes", self.lanes, 1, 1024)
        check_int("max_open_at_rest", self.max_open_at_rest, 0, 1024)
        check_float("latency_s", self.latency_s, 0.0, MAX_SECONDS)
        check_float("bytes_per_s", self.bytes_per_s, 0.0, 1e15, open_low=True)
        check_float("rest_s_per_byte", self.rest_s_per_byte, 0.0, MAX_SECONDS)


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """What of a model the times of steps grow with.

    Args:
        read_nbytes: of weights, each step.
        linear_weights: elements of the layers' matrices.
        head_weights: elements of the head.
        num_layers: of the decoder.
        attention: layers times columns of the queries.
        kv_nbytes: of a token.
        rank_nbytes: of an adapter of rank 1.
    """

    read_nbytes: float
    linear_weights: float
    head_weights: float
    num_layers: float
    attention: float
    kv_nbytes: float
    rank_nbytes: float

    def __post_init__(self) -> None:
        for amount in fields(self):
            check_float(amount.name, getattr(self, amount.name), 0.0, 1e18, open_low=True)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs of one model on one machine.

    Args:
        hardware, model: what they are of, for people.
        basis: what they rest on, for people: measured where and when, or computed from what.
        amounts: of that model.
        kind: "measured", "scaled" from what was measured of another model, or "roofline".
        error: mean error of a step's time as a share of it, where they were fitted.
        total_error: error of all steps' time together.
        num_steps: of the fit.
    """

    hardware: str
    model: str
    basis: str
    kind: str = "measured"
    amounts: Amounts
    steps: StepCosts
    loads: LoadCosts
    runs_ahead: bool = False
    error: float | None = None
    total_error: float | None = None
    num_steps: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """As JSON, replacing what is there. Raises OSError."""
        replace_file(path, (json.dumps(asdict(self), indent=2) + "\n").encode())


def read_costs(path: Path) -> Costs:
    """Of a file that `Costs.write` wrote. Raises InvalidRequestError."""
    try:
        values = read_json(path)
    except ModelError as error:
        raise InvalidRequestError(f"costs can't be read: {error}") from None
    return costs_of(values, str(path))


def costs_of(values: Mapping[str, Any], source: str) -> Costs:
    """Of the values of such a file, which `source` names. Raises InvalidRequestError."""
    unknown = set(values) - {one.name for one in fields(Costs)}
    if unknown:
        raise InvalidRequestError(f"{source}: unknown fields {', '.join(sorted(unknown))}")
    try:
        given = dict(values)
        steps, loads = StepCosts(**given.pop("steps")), LoadCosts(**given.pop("loads"))
        return Costs(steps=steps, loads=loads, amounts=Amounts(**given.pop("amounts")), **given)
    except (KeyError, TypeError) as error:
        raise InvalidRequestError(
            f"{source} holds no costs: {error}; `loraserve simulate --calibrate` writes some"
        ) from None
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{source}: {error}") from None
