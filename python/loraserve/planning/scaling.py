"""Costs of one model on one machine, from those of another."""

from __future__ import annotations

import dataclasses

from loraserve.planning.costs import Costs, StepCosts
from loraserve.planning.hardware import Hardware
from loraserve.planning.models import PlannedModel

SAME = 0.01  # sizes that differ by less are alike


def costs_on(model: PlannedModel, hardware: Hardware) -> Costs:
    """What steps of `model` take on `hardware`: as measured, or each part by what it grows with.

    The least step is reading the weights, as fast as a large copy, and for the rest launches of every layer.
    What further rows take grows with the matrices' elements, attention with its columns or the bytes of the
    KV cache, an adapter's bytes with themselves. On like hardware bytes and products go by the ratio of
    copies' and products' rates.
    """
    costs, like = hardware.costs, hardware.like or hardware
    of, to = costs.amounts, model.amounts
    ratios = {name: getattr(to, name) / getattr(of, name) for name in dataclasses.asdict(of)}
    is_same_model = all(abs(ratio - 1) < SAME for ratio in ratios.values())
    if is_same_model and hardware.like is None:
        return costs
    bytes_ratio = like.read_bytes_per_s / hardware.read_bytes_per_s
    flop_ratio = like.flop_per_s / hardware.flop_per_s
    steps = costs.steps
    least = steps.rows[0][1]
    of_weights = min(of.read_nbytes / like.read_bytes_per_s, least)
    scaled_least = (
        of_weights * ratios["read_nbytes"] * bytes_ratio + (least - of_weights) * ratios["num_layers"]
    )
    per_row = ratios["linear_weights"] * flop_ratio
    scaled = StepCosts(
        rows=tuple((rows, scaled_least + (seconds - least) * per_row) for rows, seconds in steps.rows),
        sample=steps.sample * ratios["head_weights"] * flop_ratio,
        prompt_pair=steps.prompt_pair * ratios["attention"] * flop_ratio,
        context_token=steps.context_token * ratios["kv_nbytes"] * bytes_ratio,
        any_adapter=steps.any_adapter * ratios["num_layers"],
        adapter_byte=steps.adapter_byte * bytes_ratio,
        adapter_row=steps.adapter_row * ratios["rank_nbytes"] * flop_ratio,
        segment=steps.segment * ratios["num_layers"],
        load=steps.load,
    )
    parts = [] if is_same_model else [f"the ratios of {model.name}'s sizes to {costs.model}'s"]
    if hardware.like is not None:
        parts.append(f"of {hardware.name}'s bandwidth and products to {like.name}'s")
    return dataclasses.replace(
        costs,
        hardware=hardware.name,
        model=model.name,
        basis=f"{costs.basis}; from there by {' and '.join(parts)}",
        kind="scaled" if hardware.like is None else "roofline",
        error=None,  # that of the fit says nothing of these
        total_error=None,
        amounts=to,
        steps=scaled,
    )
