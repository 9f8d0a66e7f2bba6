"""A recorded linear followed by SiLU·mul is one op: the bits of the two, adapters included."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from loraserve import _core
from loraserve.models.ops import KvGeometry, Linear

from tests.batches import token_batch
from tests.ops.building import (
    Backends,
    ModuleSpec,
    assert_close,
    make_backends,
    with_waves,
    write_adapter,
)

GEOMETRY = KvGeometry(1, 2, 1, 64)
PAGES_PER_SLOT = 40
MAX_TOKENS = 300

Wave = Sequence[tuple[int, int, int, float]]
CASES: dict[str, tuple[int, Sequence[Wave]]] = {
    "one row": (1, []),
    "a few rows, one adapter": (13, [[(0, 13, 0, 1.0)]]),
    "an adapter a row": (33, [[(row, row + 1, row % 4, 1.0) for row in range(33)]]),
    "two waves": (40, [[(0, 40, 0, 0.5)], [(0, 7, 1, 0.3), (7, 30, 3, 2.0)]]),
    "many rows": (MAX_TOKENS, [[(3, 130, 0, 1.0), (130, 170, 1, 1.0), (200, 300, 2, -0.5)]]),
}


@pytest.fixture(params=[50, 96], ids=["odd K", "K in whole tiles"])
def in_features(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=[40, 48, 512], ids=["gate ends inside a panel", "three panels", "many panels"])
def intermediate(request: pytest.FixtureRequest) -> int:
    """Columns of gate and of up; the two become one op where the gate fills whole panels."""
    return int(request.param)


@pytest.fixture
def backends(
    isa: str, dtype: torch.dtype, generator: torch.Generator, in_features: int, intermediate: int
) -> Backends:
    """Slots 0 to 3: gate and up, up only, gate only, both with ranks of their own."""
    backends = make_backends(GEOMETRY, dtype, isa, num_pages=4 * PAGES_PER_SLOT)
    gate, up = ((rank, start) for rank, start in ((16, 0), (16, intermediate)))
    for slot, places in enumerate(([gate, up], [up], [gate], [(40, 0), (8, intermediate)])):
        modules = [ModuleSpec(rank, start, intermediate, 0.5) for rank, start in places]
        groups = {(0, 2): (in_features, modules)}
        write_adapter(backends, slot, PAGES_PER_SLOT * slot, groups, 1, generator)
    return backends


def recorded(
    backends: Backends, x: torch.Tensor, linear: Linear, intermediate: int, waves: Sequence[Wave]
) -> torch.Tensor:
    """silu(gate)·up of a program whose input is x, and whose logits are what comes in."""
    ops, num_tokens = backends.cpu, len(x)
    recording = _core.CpuRecording()
    hidden = recording.input(x.data_ptr(), *x.shape)
    gated = recording.silu_mul(recording.lora_linear(hidden, linear, 0, 2))
    program = recording.logits(ops._kernels, gated, ops.pack(torch.eye(intermediate)))
    batch = with_waves(token_batch(num_tokens, np.arange(num_tokens, dtype=np.int32)), waves)
    out = torch.empty(num_tokens, intermediate)
    program.run(ops.begin_step(batch.build()), out.data_ptr())
    return out.to(ops.dtype)


@pytest.mark.parametrize("case", CASES)
def test_the_fused_op_equals_the_two(
    backends: Backends,
    dtype: torch.dtype,
    generator: torch.Generator,
    in_features: int,
    intermediate: int,
    case: str,
) -> None:
    num_tokens, waves = CASES[case]
    x = torch.randn(num_tokens, in_features, generator=generator).to(dtype)
    weight = torch.randn(2 * intermediate, in_features, generator=generator) / 4
    bias = torch.randn(2 * intermediate, generator=generator)
    batch = with_waves(token_batch(num_tokens), waves)
    separate, reference = (
        ops.silu_mul(ops.lora_linear(ops.begin_step(batch.build()), x, ops.pack(weight, bias), 0, 2))
        for ops in (backends.cpu, backends.reference)
    )
    fused = recorded(backends, x, backends.cpu.pack(weight, bias), intermediate, waves)
    assert torch.equal(fused, separate)
    assert_close(fused, reference, dtype)


def test_a_linear_that_was_fused_is_gone(dtype: torch.dtype) -> None:
    ops = make_backends(GEOMETRY, dtype).cpu
    recording = _core.CpuRecording()
    x = torch.zeros(4, 32, dtype=dtype)
    hidden = recording.input(x.data_ptr(), *x.shape)
    gate_up = recording.lora_linear(hidden, ops.pack(torch.zeros(64, 32)), 0, 2)
    recording.silu_mul(gate_up)
    with pytest.raises(ValueError, match="recorded elsewhere"):
        recording.silu_mul(gate_up)
