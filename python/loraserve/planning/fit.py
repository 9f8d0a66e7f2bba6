"""Fits `StepCosts` to steps that an engine has logged."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loraserve.engine.step_log import StepRecord
from loraserve.errors import InvalidRequestError
from loraserve.planning.costs import StepCosts

MIN_STEPS = 30
MIN_STEPS_OF_A_LINE = 10
KNOTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096)
TERMS = (
    "sample",
    "prompt_pair",
    "context_token",
    "adapter_byte",
    "adapter_row",
    "segment",
    "load",
    "any_adapter",
)
FIELDS = ("samples", "prompt_pairs", "context_tokens", "adapter_nbytes", "adapter_rows", "segments", "loads")
OUTLIER = 4.0  # times what is expected: something else had the cores
NUM_ROUNDS = 3

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """Costs, and how far they are from what was logged.

    Args:
        error: mean over steps of |expected - measured| / measured.
        total_error: of all steps' seconds together, as a share.
        num_outliers: steps left out of `num_steps`.
    """

    costs: StepCosts
    error: float
    total_error: float
    num_steps: int
    num_outliers: int


def fit(records: Sequence[StepRecord], *, keep_sum: bool = False) -> Fit:
    """Costs that are not negative, by least squares of errors over the roots of the times.

    Args:
        keep_sum: all steps together are to take what they took, those in which something else had the cores
            with them; else these are left out.

    Raises:
        InvalidRequestError: there are too few steps.
    """
    if len(records) < MIN_STEPS:
        raise InvalidRequestError(f"{len(records)} steps were logged, a fit needs at least {MIN_STEPS}")
    seconds = np.array([record.seconds for record in records])
    rows = np.array([record.rows for record in records])
    bounds = _bounds(rows)
    terms = np.array([[getattr(record, name) for name in FIELDS] for record in records])
    has_adapter = np.minimum(terms[:, FIELDS.index("segments")], 1.0)
    matrix = np.column_stack([_row_terms(rows, bounds), terms, has_adapter])
    kept = np.ones(len(seconds), dtype=bool)
    solved = np.zeros(matrix.shape[1])
    for _ in range(NUM_ROUNDS):
        weights = 1 / np.sqrt(seconds[kept])
        solved = nnls(matrix[kept] * weights[:, None], seconds[kept] * weights)
        kept = seconds < OUTLIER * np.maximum(matrix @ solved, 1e-9)
    if keep_sum:
        solved *= seconds.sum() / (matrix @ solved).sum()
    expected = (matrix @ solved)[kept]
    measured = seconds[kept]
    num_slopes = len(bounds) - 1
    heights = solved[0] + np.concatenate([[0.0], np.cumsum(solved[1 : 1 + num_slopes] * np.diff(bounds))])
    named = dict(zip(TERMS, solved[1 + num_slopes :].tolist(), strict=True))
    costs = StepCosts(rows=tuple(zip(bounds, heights.tolist(), strict=True)), **named)
    return Fit(
        costs=costs,
        error=float(np.mean(np.abs(expected - measured) / measured)),
        total_error=float(expected.sum() / measured.sum() - 1),
        num_steps=int(kept.sum()),
        num_outliers=int((~kept).sum()),
    )


def _bounds(rows: Matrix) -> list[float]:
    """Between which the cost of rows is a line: the least, the most, knots with enough steps beside them."""
    found = [float(rows.min())]
    for knot in KNOTS:
        between = np.count_nonzero((rows > found[-1]) & (rows <= knot))
        beyond = np.count_nonzero(rows > knot)
        if found[-1] < knot and min(between, beyond) >= MIN_STEPS_OF_A_LINE:
            found.append(float(knot))
    return [*found, float(rows.max())] if rows.max() > found[-1] else found


def _row_terms(rows: Matrix, bounds: Sequence[float]) -> Matrix:
    """Ones, and for each pair of neighbouring bounds how many of the rows lie between them."""
    between = [np.clip(rows - low, 0.0, high - low) for low, high in itertools.pairwise(bounds)]
    return np.column_stack([np.ones_like(rows), *between])


def nnls(matrix: Matrix, values: Matrix) -> Matrix:
    """x ≥ 0 of least |matrix · x - values| (Lawson and Hanson, Solving Least Squares Problems, 23.3)."""
    scale = np.linalg.norm(matrix, axis=0)
    used = np.flatnonzero(scale > 0)
    scaled = matrix[:, used] / scale[used]
    x = np.zeros(len(used))
    passive = np.zeros(len(used), dtype=bool)
    tolerance = 1e-10 * float(np.linalg.norm(values) + 1e-300)
    for _ in range(20 * len(used)):
        gradient = scaled.T @ (values - scaled @ x)
        gradient[passive] = -np.inf
        if not len(used) or gradient.max() <= tolerance:
            break
        passive[int(gradient.argmax())] = True
        x = _step_to_positive(scaled, values, x, passive)
    solved = np.zeros(matrix.shape[1])
    solved[used] = x / scale[used]
    return solved


def _step_to_positive(scaled: Matrix, values: Matrix, x: Matrix, passive: npt.NDArray[np.bool_]) -> Matrix:
    """The least squares of the passive columns; those that would turn negative leave on the way."""
    while True:
        target = np.zeros_like(x)
        target[passive] = np.linalg.lstsq(scaled[:, passive], values, rcond=None)[0]
        falling = passive & (target <= 0)
        if not falling.any():
            return target
        steps = x[falling] / np.maximum(x[falling] - target[falling], 1e-300)
        x = x + steps.min() * (target - x)
        passive &= x > 1e-14
        x = np.where(passive, x, 0.0)
