"""Costs that no machine has, for tests."""

from loraserve.planning.costs import Amounts, Costs, LoadCosts, StepCosts

AMOUNTS = Amounts(
    read_nbytes=2.7e8,
    linear_weights=1.06e8,
    head_weights=2.8e7,
    num_layers=30,
    attention=30 * 576,
    kv_nbytes=23040,
    rank_nbytes=610_000,
)
STEPS = StepCosts(rows=((1.0, 6e-3), (32.0, 20e-3)), context_token=1e-7, adapter_byte=3e-11)
LOADS = LoadCosts(lanes=2, latency_s=2e-3, bytes_per_s=5e8)
COSTS = Costs(
    hardware="a drawing board", model="smollm2", basis="made up", amounts=AMOUNTS, steps=STEPS, loads=LOADS
)
