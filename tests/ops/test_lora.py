"""Segmented LoRA against the reference: ranks, absent modules and layers, waves, invariance."""

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

GEOMETRY = KvGeometry(3, 2, 1, 64)
OUT_FEATURES = 100
# Column ranges of the fused output, as q, k and v would have.
PLACES = [(0, 60), (60, 20), (80, 20)]
PAGES_PER_SLOT = 16

Wave = Sequence[tuple[int, int, int, float]]


def modules(ranks: list[int], scale: float = 0.5) -> list[ModuleSpec]:
    """One module per place; rank 0 leaves it out."""
    return [
        ModuleSpec(rank, offset, width, scale + index)
        for index, (rank, (offset, width)) in enumerate(zip(ranks, PLACES, strict=True))
        if rank > 0
    ]


@pytest.fixture(params=[75, 96], ids=["odd K", "K in whole tiles"])
def in_features(request: pytest.FixtureRequest) -> int:
    """AMX takes products whose K is a multiple of 32; others run in vectors."""
    return int(request.param)


@pytest.fixture(params=[False, True], ids=["A and B in dtype", "A and B in int8"])
def is_int8(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def backends(
    isa: str, dtype: torch.dtype, generator: torch.Generator, in_features: int, is_int8: bool
) -> Backends:
    """Slots: 0 everything at rank 16; 1 q at 8 and v at 256; 2 layer 1 only; 3 k at 40."""
    backends = make_backends(GEOMETRY, dtype, isa, num_pages=4 * PAGES_PER_SLOT)
    adapters = [
        {(layer, 0): (in_features, modules([16, 16, 16])) for layer in range(3)},
        {(0, 0): (in_features, modules([8, 0, 256]))},
        {(1, 0): (in_features, modules([64, 24, 8]))},
        {(0, 0): (in_features, modules([0, 40, 0])), (0, 2): (in_features, modules([8, 0, 0]))},
    ]
    for slot, groups in enumerate(adapters):
        first_page = PAGES_PER_SLOT * slot
        write_adapter(backends, slot, first_page, groups, GEOMETRY.num_layers, generator, is_int8=is_int8)
    return backends


def run_cpu(backends: Backends, x: torch.Tensor, linear: Linear, waves: Sequence[Wave]) -> torch.Tensor:
    step = backends.cpu.begin_step(with_waves(token_batch(len(x)), waves).build())
    return backends.cpu.lora_linear(step, x, linear, 0, 0)


CASES: dict[str, tuple[int, Sequence[Wave]]] = {
    "no segments": (5, []),
    "one token each": (4, [[(0, 1, 0, 1.0), (1, 2, 1, 1.0), (2, 3, 2, 1.0), (3, 4, 3, 1.0)]]),
    "long segments around base rows": (90, [[(3, 41, 0, 1.0), (41, 42, 1, 0.7), (50, 89, 3, -1.0)]]),
    "empty segments": (6, [[(0, 0, 0, 1.0), (2, 4, 1, 1.0), (4, 4, 2, 1.0), (6, 6, 3, 1.0)]]),
    "three waves": (
        40,
        [[(0, 40, 0, 0.5)], [(0, 7, 1, 0.3), (7, 40, 3, 2.0)], [(5, 6, 3, 1.0), (6, 30, 0, -0.5)]],
    ),
    "many adapters in few rows, in waves": (
        45,
        [
            [(0, 1, 1, 1.0), (1, 4, 0, 0.5), (4, 21, 3, 1.0), (21, 22, 1, -1.0), (30, 45, 0, 1.0)],
            [(0, 2, 3, 0.5), (3, 9, 1, 1.0), (20, 40, 0, 0.25)],
        ],
    ),
    "an empty wave": (3, [[], [(0, 3, 0, 1.0)], []]),
    "same adapter in two segments": (8, [[(0, 2, 1, 1.0), (5, 8, 1, 0.25)]]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("layer", "group"), [(0, 0), (1, 0), (2, 0), (0, 2), (0, 1)])
def test_lora_linear_matches_reference(
    backends: Backends,
    dtype: torch.dtype,
    generator: torch.Generator,
    in_features: int,
    case: str,
    layer: int,
    group: int,
) -> None:
    num_tokens, waves = CASES[case]
    x = torch.randn(num_tokens, in_features, generator=generator).to(dtype)
    weight = torch.randn(OUT_FEATURES, in_features, generator=generator)
    bias = torch.randn(OUT_FEATURES, generator=generator)
    batch = with_waves(token_batch(num_tokens), waves)
    actual, expected = (
        ops.lora_linear(ops.begin_step(batch.build()), x, ops.pack(weight, bias), layer, group)
        for ops in (backends.cpu, backends.reference)
    )
    assert_close(actual, expected, dtype)


def test_adapters_change_the_output_of_their_rows_only(
    backends: Backends, dtype: torch.dtype, generator: torch.Generator, in_features: int
) -> None:
    x = torch.randn(10, in_features, generator=generator).to(dtype)
    linear = backends.cpu.pack(torch.randn(OUT_FEATURES, in_features, generator=generator))
    plain = run_cpu(backends, x, linear, [])
    adapted = run_cpu(backends, x, linear, [[(2, 5, 0, 1.0)]])
    changed = (plain != adapted).any(dim=1)
    assert changed.tolist() == [False] * 2 + [True] * 3 + [False] * 5


def test_a_row_is_bit_identical_alone_and_in_a_mixed_batch(
    backends: Backends, dtype: torch.dtype, generator: torch.Generator, in_features: int
) -> None:
    x = torch.randn(100, in_features, generator=generator).to(dtype)
    linear = backends.cpu.pack(torch.randn(OUT_FEATURES, in_features, generator=generator))
    together = run_cpu(backends, x, linear, [[(0, 1, 3, 1.0), (1, 78, 1, 0.5), (90, 100, 0, 1.0)]])
    for rows, slot, weight in ((slice(1, 78), 1, 0.5), (slice(40, 43), 1, 0.5), (slice(95, 96), 0, 1.0)):
        wave = [(0, rows.stop - rows.start, slot, weight)]
        alone = run_cpu(backends, x[rows].contiguous(), linear, [wave])
        assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("slot", range(4))
def test_a_lone_row_has_the_bits_it_has_in_a_segment(
    backends: Backends, dtype: torch.dtype, generator: torch.Generator, in_features: int, slot: int
) -> None:
    """Lone rows run in vectors where segments run in tiles; many adapters are added one after another."""
    x = torch.randn(40, in_features, generator=generator).to(dtype)
    linear = backends.cpu.pack(torch.randn(OUT_FEATURES, in_features, generator=generator))
    segment = run_cpu(backends, x, linear, [[(0, 40, slot, 0.7)]])
    lone = run_cpu(backends, x, linear, [[(row, row + 1, slot, 0.7) for row in range(40)]])
    pairs = run_cpu(backends, x, linear, [[(row, row + 2, slot, 0.7) for row in range(0, 40, 2)]])
    alone = run_cpu(backends, x[7:8].contiguous(), linear, [[(0, 1, slot, 0.7)]])
    assert torch.equal(lone, segment)
    assert torch.equal(pairs, segment)
    assert torch.equal(alone, segment[7:8])


def test_moved_extent_computes_the_same(
    backends: Backends, dtype: torch.dtype, generator: torch.Generator, in_features: int
) -> None:
    x = torch.randn(3, in_features, generator=generator).to(dtype)
    linear = backends.cpu.pack(torch.randn(OUT_FEATURES, in_features, generator=generator))
    wave = [(0, 3, 1, 1.0)]
    before = run_cpu(backends, x, linear, [wave])
    backends.cpu.move_extent(1, PAGES_PER_SLOT, PAGES_PER_SLOT - 3, PAGES_PER_SLOT)  # overlaps itself
    assert torch.equal(run_cpu(backends, x, linear, [wave]), before)


def test_impossible_steps_and_layouts_are_refused(backends: Backends) -> None:
    cpu = backends.cpu
    for waves, message in (
        ([[(0, 1, 9, 1.0)]], "slot 9"),
        ([[(0, 2, 0, 1.0)]], "leaves the batch"),
        ([[(0, 1, 0, 1.0), (0, 1, 1, 1.0)]], "overlaps"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.begin_step(with_waves(token_batch(1), waves).build())
    outside = _core.AdapterLayout.from_groups([(0, 0, 0, 8, 75, [(0, 8, 4096, 0, 60, 1.0)])], 3, 4096)
    with pytest.raises(ValueError, match="end of B"):
        cpu.set_adapter(0, 0, outside)
    with pytest.raises(ValueError, match="extent"):
        cpu.set_adapter(0, 10**6, outside)


def test_adapter_of_another_shape_is_refused(
    backends: Backends, dtype: torch.dtype, in_features: int
) -> None:
    cpu = backends.cpu
    step = cpu.begin_step(with_waves(token_batch(1), [[(0, 1, 0, 1.0)]]).build())
    with pytest.raises(ValueError, match=f"in_features has length {in_features}, expected 64"):
        cpu.lora_linear(step, torch.zeros(1, 64, dtype=dtype), cpu.pack(torch.zeros(100, 64)), 0, 0)
    x, linear = torch.zeros(1, in_features, dtype=dtype), cpu.pack(torch.zeros(96, in_features))
    with pytest.raises(ValueError, match="column 100, the projection has 96"):
        cpu.lora_linear(step, x, linear, 0, 0)


SHIFTING = (
    (16, True, False),
    (8, False, True),
    (0, True, True),
    (40, True, True),
    (0, False, True),
    (24, False, False),
)


@pytest.fixture
def shifting(
    isa: str, dtype: torch.dtype, generator: torch.Generator, in_features: int, is_int8: bool
) -> Backends:
    """Adapters with gains and shifts, in panels that two modules share; slot 3 has no A and no B."""
    backends = make_backends(GEOMETRY, dtype, isa, num_pages=4 * PAGES_PER_SLOT)
    for slot, kinds in enumerate([(0, 1, 2), (3, 4, 5), (5, 2, 0), (2, 4, 2)]):
        specs = [
            ModuleSpec(*(SHIFTING[kind][0], *place, 0.5 + index), *SHIFTING[kind][1:])
            for index, (kind, place) in enumerate(zip(kinds, PLACES, strict=True))
        ]
        groups = {(0, 0): (in_features, specs)}
        first_page = PAGES_PER_SLOT * slot
        write_adapter(backends, slot, first_page, groups, GEOMETRY.num_layers, generator, is_int8=is_int8)
    return backends


@pytest.mark.parametrize("case", CASES)
def test_gains_and_shifts_match_reference(
    shifting: Backends, dtype: torch.dtype, generator: torch.Generator, in_features: int, case: str
) -> None:
    num_tokens, waves = CASES[case]
    x = torch.randn(num_tokens, in_features, generator=generator).to(dtype)
    weight = torch.randn(OUT_FEATURES, in_features, generator=generator)
    for bias in (None, torch.randn(OUT_FEATURES, generator=generator)):
        batch = with_waves(token_batch(num_tokens), waves)
        actual, expected = (
            ops.lora_linear(ops.begin_step(batch.build()), x, ops.pack(weight, bias), 0, 0)
            for ops in (shifting.cpu, shifting.reference)
        )
        assert_close(actual, expected, dtype)


def test_gains_and_shifts_keep_to_their_rows_with_the_same_bits_alone_and_mixed(
    shifting: Backends, dtype: torch.dtype, generator: torch.Generator, in_features: int
) -> None:
    x = torch.randn(60, in_features, generator=generator).to(dtype)
    linear = shifting.cpu.pack(torch.randn(OUT_FEATURES, in_features, generator=generator))
    plain = run_cpu(shifting, x, linear, [])
    wave = [(0, 1, 3, 1.0), (1, 38, 0, 1.0), (40, 41, 1, 1.0), (45, 60, 2, 0.5)]
    together = run_cpu(shifting, x, linear, [wave])
    changed = (plain != together).any(dim=1)
    assert changed.tolist() == [*[True] * 38, False, False, True, *[False] * 4, *[True] * 15]
    for start, end, slot, weight in wave:
        rows = x[start:end].contiguous()
        alone = run_cpu(shifting, rows, linear, [[(0, end - start, slot, weight)]])
        assert torch.equal(alone, together[start:end])


def test_a_gain_or_shift_outside_its_extent_is_refused(backends: Backends) -> None:
    place = (0, 0, 0, 0, 75, [(0, 0, 0, 0, 60, 1.0)])
    for offset, message in ((4096, "end of columns"), (8, "64-byte aligned"), (3072 - 64, "end of columns")):
        layout = _core.AdapterLayout.from_groups([place], 3, 4096, [(0, 0, 0, offset, False, True)])
        with pytest.raises(ValueError, match=message):
            backends.cpu.set_adapter(0, 0, layout)
    with pytest.raises(ValueError, match="no module of group 0 of layer 0 begins at column 16"):
        _core.AdapterLayout.from_groups([place], 3, 4096, [(0, 0, 16, 0, True, True)])
    with pytest.raises(ValueError, match="module is empty"):
        backends.cpu.set_adapter(0, 0, _core.AdapterLayout.from_groups([place], 3, 4096))


def test_scales_of_int8_outside_their_extent_are_refused(backends: Backends) -> None:
    place = (0, 0, 0, 8, 75, [(0, 8, 640, 0, 60, 1.0)])
    for offset, message in ((4096, "end of scales"), (8, "64-byte aligned"), (3072, "end of scales")):
        layout = _core.AdapterLayout.from_groups([place], 3, 4096, scales=[(0, 0, offset)])
        with pytest.raises(ValueError, match=message):
            backends.cpu.set_adapter(0, 0, layout)
    with pytest.raises(ValueError, match="there is no group 1 of layer 0"):
        _core.AdapterLayout.from_groups([place], 3, 4096, scales=[(0, 1, 64)])


def test_a_step_that_mixes_adapters_in_int8_and_in_floats_is_refused(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    backends = make_backends(GEOMETRY, dtype, num_pages=2 * PAGES_PER_SLOT)
    groups = {(0, 0): (64, modules([8, 0, 0]))}
    for slot in range(2):
        first_page = PAGES_PER_SLOT * slot
        write_adapter(backends, slot, first_page, groups, GEOMETRY.num_layers, generator, is_int8=slot == 1)
    x, linear = torch.zeros(2, 64, dtype=dtype), backends.cpu.pack(torch.zeros(OUT_FEATURES, 64))
    with pytest.raises(ValueError, match="adapters of a step are in int8 and in float"):
        run_cpu(backends, x, linear, [[(0, 1, 0, 1.0), (1, 2, 1, 1.0)]])


def test_random_mixtures_match_reference(isa: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    rng = np.random.default_rng(1)
    for turn in range(8):
        in_features, width = (int(n) for n in rng.integers(1, 150, size=2))
        backends = make_backends(GEOMETRY, dtype, isa, num_pages=4 * PAGES_PER_SLOT)
        for slot in range(4):
            rank = 8 * int(rng.integers(1, 9))
            groups = {(0, 0): (in_features, [ModuleSpec(rank, 0, width, float(rng.normal()))])}
            first_page, is_int8 = PAGES_PER_SLOT * slot, turn % 2 == 1
            write_adapter(backends, slot, first_page, groups, GEOMETRY.num_layers, generator, is_int8=is_int8)
        num_tokens = int(rng.integers(1, 80))
        cuts = sorted(int(n) for n in rng.integers(0, num_tokens + 1, size=4))
        wave = [(cuts[i], cuts[i + 1], int(rng.integers(0, 4)), float(rng.normal())) for i in range(3)]
        batch = with_waves(token_batch(num_tokens), [wave])
        x = torch.randn(num_tokens, in_features, generator=generator).to(dtype)
        weight = torch.randn(width, in_features, generator=generator)
        actual, expected = (
            ops.lora_linear(ops.begin_step(batch.build()), x, ops.pack(weight), 0, 0)
            for ops in (backends.cpu, backends.reference)
        )
        assert_close(actual, expected, dtype)
