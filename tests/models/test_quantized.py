"""Quantised weights: ggml's blocks as the gguf package reads them, weights made here, arrays."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraserve import _core
from loraserve.models.quantized import MADE_FORMATS, QuantFormat, dequantize, format_of, from_arrays, quantize

from tests.gil import ticking

# Where in a block its float16 scales lie, and the format that it is kept in.
TYPES = {
    "Q4_0": ([0], QuantFormat(4, 32, has_mins=False)),
    "Q4_1": ([0, 2], QuantFormat(4, 32, has_mins=True)),
    "Q5_0": ([0], QuantFormat(8, 32, has_mins=False)),
    "Q5_1": ([0, 2], QuantFormat(8, 32, has_mins=True)),
    "Q8_0": ([0], QuantFormat(8, 32, has_mins=False)),
    "Q2_K": ([80, 82], QuantFormat(4, 16, has_mins=True)),
    "Q3_K": ([108], QuantFormat(8, 16, has_mins=False)),
    "Q4_K": ([0, 2], QuantFormat(4, 32, has_mins=True)),
    "Q5_K": ([0, 2], QuantFormat(8, 32, has_mins=True)),
    "Q6_K": ([208], QuantFormat(8, 16, has_mins=False)),
    "IQ4_NL": ([0], QuantFormat(8, 32, has_mins=False)),
    "IQ4_XS": ([0], QuantFormat(8, 32, has_mins=False)),
}


def random_blocks(name: str, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Random bytes whose float16 are any finite ones, subnormal and largest ones among them."""
    _, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (rows * blocks, nbytes), dtype=np.uint8)
    for at in TYPES[name][0]:
        bits = generator.integers(0, 2**16, rows * blocks, dtype=np.uint16)
        special = generator.integers(0, 8, rows * blocks)
        bits = np.where(special == 0, bits & 0x83FF, bits)  # subnormal
        bits = np.where(special == 1, bits | 0x7BFF, bits)  # largest
        bits = np.where(bits & 0x7C00 == 0x7C00, bits & 0xBFFF, bits).astype(np.uint16)
        raw[:, at : at + 2] = bits.view(np.uint8).reshape(-1, 2)
    return raw.reshape(rows, blocks * nbytes)


def from_ggml(name: str, raw: np.ndarray, order: list[int] | None = None) -> _core.QuantizedWeight:
    kind = gguf.GGMLQuantizationType[name]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    columns = raw.shape[1] // nbytes * block
    return _core.QuantizedWeight.from_ggml(
        int(kind), raw.ctypes.data, raw.nbytes, columns, raw.shape[0], order
    )


@pytest.mark.parametrize("name", TYPES)
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_blocks_are_what_gguf_dequantises_them_to(name: str, rows: int, blocks: int, seed: int) -> None:
    raw = random_blocks(name, rows, blocks, seed)
    weight = from_ggml(name, raw)
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[name])
    assert np.array_equal(dequantize(weight).numpy(), expected)
    assert format_of(weight) == TYPES[name][1]


@pytest.mark.parametrize("name", TYPES)
def test_the_format_of_a_type_is_known_without_reading(name: str) -> None:
    found = _core.ggml_format(int(gguf.GGMLQuantizationType[name]))
    assert found is not None
    assert QuantFormat(*found) == TYPES[name][1]


@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "IQ1_S", "MXFP4", "TQ1_0"])
def test_other_types_are_not_kept_quantised(name: str) -> None:
    assert _core.ggml_format(int(gguf.GGMLQuantizationType[name])) is None


def test_rows_are_read_in_the_order_given() -> None:
    raw = random_blocks("Q4_K", 7, 2, 0)
    order = [3, 0, 6, 1, 2, 5, 4]
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType.Q4_K)[order]
    assert np.array_equal(dequantize(from_ggml("Q4_K", raw, order)).numpy(), expected)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("scale", [0x7C00, 0x7E00, 0xFC00])
def test_scales_that_are_not_finite_are_refused(name: str, scale: int) -> None:
    for at in TYPES[name][0]:
        raw = random_blocks(name, 2, 1, 1) | 1
        raw[1, at : at + 2] = np.array([scale], dtype=np.uint16).view(np.uint8)
        with pytest.raises(ValueError, match="not finite"):
            from_ggml(name, raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_made_weights_err_by_less_than_their_step(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(70, 96) * torch.logspace(-4, 2, 70)[:, None]).to(dtype)
    made = quantize(weight, kind)  # type: ignore[arg-type]
    assert format_of(made) == MADE_FORMATS[kind]  # type: ignore[index]
    groups = weight.float().view(70, 3, 32)
    errors = (dequantize(made) - weight.float()).view(70, 3, 32).abs().amax(dim=-1)
    span = groups.abs().amax(dim=-1) / 127 if kind == "int8" else (groups.amax(-1) - groups.amin(-1)) / 15
    assert bool((errors <= span * (0.51 if kind == "int8" else 2.5)).all())
    assert torch.equal(dequantize(quantize(weight, kind)), dequantize(made))  # type: ignore[arg-type]


def test_four_bits_err_less_than_ggmls_q4_1() -> None:
    torch.manual_seed(0)
    weight = torch.randn(200, 256)
    kind = gguf.GGMLQuantizationType.Q4_1
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))
    ours = dequantize(quantize(weight, "int4"))
    assert (ours - weight).square().mean() < 0.9 * (theirs - weight).square().mean()


@pytest.mark.parametrize("group", [16, 32, 48, 64, 192])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_mins", [False, True])
def test_arrays_become_weights_and_come_back(bits: int, group: int, has_mins: bool) -> None:
    torch.manual_seed(0)
    quants = torch.randint(0, 16, (5, 192)).to(torch.uint8)
    if bits == 8:
        quants = torch.randint(-128, 128, (5, 192)).to(torch.int8)
    scales = torch.randn(5, 192 // group)
    mins = torch.randn(5, 192 // group) if has_mins else None
    weight = from_arrays(bits, quants, scales, mins)
    zero = 8 if bits == 4 and not has_mins else 0
    expected = scales.repeat_interleave(group, 1) * (quants.float() - zero)
    if mins is not None:
        expected += mins.repeat_interleave(group, 1)
    assert torch.equal(dequantize(weight), expected)

    copied = torch.empty_like(quants)
    scales_out = torch.empty(5, 192 // weight.group)
    mins_out = torch.empty_like(scales_out) if has_mins else None
    weight.copy_to(
        copied.data_ptr(), scales_out.data_ptr(), None if mins_out is None else mins_out.data_ptr()
    )
    assert torch.equal(dequantize(from_arrays(bits, copied, scales_out, mins_out)), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quantize(torch.full((2, 32), torch.nan), "int8"), "in row 0, it must be finite"),
        (lambda: quantize(torch.ones(2, 48), "int4"), "48 columns in groups of 32"),
        (lambda: quantize(torch.ones(0, 32), "int8"), "both must be positive"),
        (lambda: quantize(torch.ones(2, 32), "int3"), "to int8 or int4, not .int3"),  # type: ignore[arg-type]
        (lambda: _core.QuantizedWeight.quantize(0, "int64", 32, 2, "int8"), "dtype .int64"),
        (lambda: _core.QuantizedWeight.quantize(0, "float32", 2**63, 2, "int8"), "overflows"),
        (lambda: from_arrays(5, torch.zeros(2, 32).byte(), torch.ones(2, 1)), "bits is 5"),
        (lambda: from_arrays(4, torch.full((2, 32), 16).byte(), torch.ones(2, 1)), "above 15"),
        (lambda: from_arrays(4, torch.zeros(2, 40).byte(), torch.ones(2, 5)), "groups of 8"),
        (lambda: from_arrays(4, torch.zeros(2, 40).byte(), torch.ones(2, 3)), "not 3 equal groups"),
        (lambda: from_arrays(4, torch.zeros(2, 32).byte(), torch.ones(1, 1)), "scales are"),
        (lambda: from_arrays(8, torch.zeros(2, 32).char(), torch.full((2, 1), torch.inf)), "not finite"),
        (lambda: _core.QuantizedWeight.from_ggml(1, 0, 0, 32, 1), "ggml type 1 is not kept"),
        (lambda: _core.QuantizedWeight.from_ggml(8, 0, 0, 32, 1), "blocks has length 0"),
    ],
)
def test_what_is_no_quantised_weight_is_refused(make: object, message: str) -> None:
    with pytest.raises((ValueError, OverflowError), match=message):
        make()  # type: ignore[operator]


def test_weights_are_quantised_without_the_gil() -> None:
    weight = torch.randn(4096, 512)
    with ticking() as ticks:
        quantize(weight, "int4")
    assert ticks
