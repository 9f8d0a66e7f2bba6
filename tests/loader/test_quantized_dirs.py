"""AWQ, GPTQ and compressed-tensors: read exactly, kept quantised where they can be, refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve.errors import ModelError
from loraserve.loader import open_checkpoint
from loraserve.loader.fingerprint import fingerprint
from loraserve.models.quantized import QuantFormat, dequantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.loader import quantized_writer as writer
from tests.loader.quantized_writer import write_quantized
from tests.models.running import Running
from tests.models.tiny import make_model, save_model

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def compressed(layout: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {**WEIGHTS, **weights}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def with_group(**fields: Any) -> dict[str, Any]:
    config = compressed()
    config["config_groups"]["group_0"] |= fields
    return config


# name: (config, what writes a linear, how a weight of 64 columns is kept)
FORMATS: Mapping[str, tuple[dict[str, Any], Any, QuantFormat]] = {
    "awq": (AWQ, writer.awq, QuantFormat(4, 32, has_mins=True)),
    "awq of whole rows": (
        AWQ | {"group_size": -1},
        partial(writer.awq, group=None),
        QuantFormat(4, 32, has_mins=True),
    ),
    "awq of 16": (AWQ, partial(writer.awq, group=16), QuantFormat(4, 16, has_mins=True)),
    "gptq": (GPTQ, writer.gptq, QuantFormat(4, 32, has_mins=False)),
    "gptq asymmetric": (
        GPTQ | {"sym": False},
        partial(writer.gptq, symmetric=False),
        QuantFormat(4, 32, has_mins=True),
    ),
    "gptq v2": (
        GPTQ | {"checkpoint_format": "gptq_v2", "sym": False},
        partial(writer.gptq, symmetric=False, is_v2=True),
        QuantFormat(4, 32, has_mins=True),
    ),
    "gptq 8 bits": (
        GPTQ | {"bits": 8},
        partial(writer.gptq, bits=8),
        QuantFormat(8, 32, has_mins=False),
    ),
    "gptq 8 bits asymmetric": (
        GPTQ | {"bits": 8, "checkpoint_format": "gptq"},
        partial(writer.gptq, bits=8, symmetric=False, group=None),
        QuantFormat(8, 32, has_mins=True),
    ),
    "pack-quantized": (compressed(), writer.pack_quantized, QuantFormat(4, 32, has_mins=False)),
    "pack-quantized asymmetric": (
        compressed(symmetric=False),
        partial(writer.pack_quantized, symmetric=False, group=None),
        QuantFormat(4, 32, has_mins=True),
    ),
    "pack-quantized 8 bits": (
        compressed(num_bits=8),
        partial(writer.pack_quantized, bits=8, group=None),
        QuantFormat(8, 32, has_mins=False),
    ),
    "pack-quantized 8 bits asymmetric": (
        compressed(num_bits=8),
        partial(writer.pack_quantized, bits=8, symmetric=False),
        QuantFormat(8, 32, has_mins=True),
    ),
    "int-quantized": (
        compressed("int-quantized", num_bits=8, strategy="channel"),
        writer.int_quantized,
        QuantFormat(8, 32, has_mins=False),
    ),
    "int-quantized asymmetric": (
        compressed("naive-quantized", num_bits=8),
        partial(writer.int_quantized, symmetric=False, group=16),
        QuantFormat(8, 16, has_mins=True),
    ),
    "int-quantized of one scale": (
        compressed("int-quantized", num_bits=8, strategy="tensor"),
        partial(writer.int_quantized, is_of_tensor=True),
        QuantFormat(8, 32, has_mins=False),
    ),
    "int-quantized of one scale and zero": (
        compressed("int-quantized", num_bits=8, strategy="tensor"),
        partial(writer.int_quantized, is_of_tensor=True, symmetric=False),
        QuantFormat(8, 32, has_mins=True),
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("llama with biases"), tmp_path_factory.mktemp("source"))


def logits(path: Path) -> Tensor:
    return Running(path, "torch").logits([5, 9, 2, 77, 31])


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_exactly_what_the_format_says(name: str, source: Path, tmp_path: Path) -> None:
    config, write, form = FORMATS[name]
    expected = write_quantized(source, tmp_path / "model", config, write, keep=["0.mlp.up_proj"])
    with open_checkpoint(tmp_path / "model") as checkpoint:
        assert set(checkpoint.names()) == set(expected)
        assert checkpoint.quantization == config["quant_method"]
        for tensor, weight in expected.items():
            assert checkpoint.shape(tensor) == tuple(weight.shape)
            assert torch.equal(checkpoint.tensor(tensor).float(), weight), tensor
            for index in {0, 3, 9, len(weight) - 1}:
                row = checkpoint.row(tensor, index).float()
                assert torch.equal(row, weight[index] if weight.ndim == 2 else weight), (tensor, index)
            is_kept = tensor.endswith("_proj.weight") and "0.mlp.up_proj" not in tensor
            found = checkpoint.quant_format(tensor)
            assert (found is not None) == is_kept
            if found is not None:
                assert found == form
                kept = checkpoint.quantized(tensor, (weight.shape[0], weight.shape[1]))
                assert torch.equal(dequantize(kept), weight), tensor
                assert (kept.bits, kept.group, kept.has_mins) == (form.bits, form.group, form.has_mins)
        checkpoint.check_all_used()


@pytest.mark.parametrize("name", ["awq", "gptq", "int-quantized", "pack-quantized"])
def test_a_quantised_model_computes_as_its_dense_weights(name: str, source: Path, tmp_path: Path) -> None:
    config, write, _ = FORMATS[name]
    dense = write_quantized(source, tmp_path / "model", config, write)
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text((source / "config.json").read_text())
    (tmp_path / "dense" / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    save_file(dense, tmp_path / "dense" / "model.safetensors")
    assert torch.equal(logits(tmp_path / "model"), logits(tmp_path / "dense"))
    with open_checkpoint(tmp_path / "model") as model, open_checkpoint(tmp_path / "dense") as other:
        assert fingerprint(model) == fingerprint(other)


def test_columns_quantised_in_another_order_are_read_dense(source: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    orders = {64: torch.randperm(64), 96: torch.randperm(96)}
    config = GPTQ | {"desc_act": True, "sym": False}

    def write(weight: Tensor) -> writer.Parts:
        return writer.gptq(weight, symmetric=False, order=orders[weight.shape[1]])

    expected = write_quantized(source, tmp_path / "model", config, write)
    with open_checkpoint(tmp_path / "model") as checkpoint:
        for tensor, weight in expected.items():
            assert torch.equal(checkpoint.tensor(tensor).float(), weight), tensor
            assert checkpoint.quant_format(tensor) is None
        checkpoint.check_all_used()


def test_groups_that_no_kernel_has_are_read_dense(source: Path, tmp_path: Path) -> None:
    expected = write_quantized(source, tmp_path / "model", GPTQ, partial(writer.gptq, group=8))
    with open_checkpoint(tmp_path / "model") as checkpoint:
        name = "model.layers.0.mlp.up_proj.weight"
        assert checkpoint.quant_format(name) is None
        assert torch.equal(checkpoint.tensor(name), expected[name])


def test_biases_of_zeros_beside_quantised_weights_add_nothing(tmp_path: Path) -> None:
    source = save_model(make_model("llama"), tmp_path / "source")

    def write(weight: Tensor) -> writer.Parts:
        stands_for, parts = writer.gptq(weight)
        return stands_for, parts | {"bias": torch.zeros(len(weight), dtype=torch.float16)}

    write_quantized(source, tmp_path / "model", GPTQ, write)
    assert logits(tmp_path / "model").isfinite().all()
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.bias"][3] = 1
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"tensor model.layers.1.mlp.up_proj.bias has no place in"):
        logits(tmp_path / "model")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            r"quantised \(bitsandbytes\), quantization_c",
        ),
        ({"quant_method": "fp8"}, r"quantised \(fp8\), .* awq, gptq, compressed-tensors are read"),
        ({"quant_method": ["hqq"]}, r"quantised \(\['hqq'\]\)"),
        ({}, r"quantised \(unknown\)"),
        ("mxfp4", r"quantised \(mxfp4\)"),
        (AWQ | {"version": "gemv"}, "by awq with 4 bits and version 'gemv', 4 bits and version gemm are"),
        (AWQ | {"bits": 3}, "by awq with 3 bits"),
        (AWQ | {"version": 7}, "version 7"),
        (GPTQ | {"bits": 3}, "by gptq with 3 bits"),
        (GPTQ | {"bits": True}, "by gptq with True bits"),
        (GPTQ | {"bits": None}, "by gptq with None bits"),
        (GPTQ | {"bits": [4]}, r"by gptq with \[4\] bits"),
        (AWQ | {"bits": [4]}, r"by awq with \[4\] bits"),
        (compressed(num_bits=[4]), r"weights of \[4\] bits"),
        (compressed(type=["int"]), "weights of 4 bits of type"),
        (compressed(["pack-quantized"]), "with format"),  # type: ignore[arg-type]
        (GPTQ | {"checkpoint_format": "marlin"}, "format 'marlin': 4 or 8 bits and gptq or gptq_v2"),
        (GPTQ | {"is_marlin_format": True}, "format 'marlin'"),
        (compressed("float-quantized"), "compressed-tensors with format 'float-quantized', which is not"),
        (compressed(type="float", num_bits=8), "weights of 8 bits of type 'float'"),
        (compressed(num_bits=2), "weights of 2 bits"),
        (compressed(strategy="block"), "strategy 'block'"),
        (compressed() | {"config_groups": {}}, "config_groups {}"),
        (compressed() | {"config_groups": {"a": 3}}, "with a 3"),
        (compressed() | {"kv_cache_scheme": {"num_bits": 8}}, "with kv_cache_scheme"),
        (compressed() | {"transform_config": {"config_groups": {"R1": {}}}}, "with transform_config"),
        (compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "with sparsity_config"),
        (with_group(input_activations={"num_bits": 8, "dynamic": False}), "with static input_activations"),
        (with_group(weights=None), "with group_0"),
    ],
)
def test_other_ways_to_quantise_are_refused_by_name(
    config: object, message: str, source: Path, tmp_path: Path
) -> None:
    write_quantized(source, tmp_path / "model", AWQ, writer.awq)
    raw = json.loads((source / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**raw, "quantization_config": config}))
    with pytest.raises(ModelError, match=message) as error:
        open_checkpoint(tmp_path / "model")
    assert str(tmp_path / "model") in str(error.value)


UP = "model.layers.1.mlp.up_proj"
Edit = Callable[[dict[str, Tensor]], object]


def put(part: str, make: Callable[[Tensor], Tensor]) -> Edit:
    return lambda tensors: tensors.update({f"{UP}.{part}": make(tensors[f"{UP}.{part}"]).contiguous()})


def drop(part: str) -> Edit:
    return lambda tensors: tensors.pop(f"{UP}.{part}")


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("awq", drop("qzeros"), "up_proj.qweight comes without model.layers.1.mlp.up_proj.qzeros"),
        ("awq", drop("scales"), "comes without model.layers.1.mlp.up_proj.scales"),
        ("awq", drop("qweight"), "has no place in|up_proj.weight is missing"),
        ("awq", put("qweight", Tensor.float), "qweight has dtype torch.float32, expected int32"),
        ("awq", put("qzeros", lambda t: t[:1]), r"qzeros has shape \[1, 12\], expected 2 groups of 96"),
        ("awq", put("scales", lambda t: t[:, :9]), r"scales has shape \[2, 9\], the weight is \[96, 64\]"),
        ("awq", put("scales", lambda t: t[:0]), r"scales has shape \[0, 96\], expected a matrix"),
        ("awq", put("scales", Tensor.int), "scales has dtype torch.int32, expected float16"),
        ("awq", put("scales", lambda t: t * torch.nan), "up_proj.weight can't be read: .*not finite"),
        ("awq", put("qweight", lambda t: t[0]), r"qweight has shape \[12\], expected a matrix"),
        ("awq", put("qweight", lambda t: t[:32]), r"shape \[96, 32\], expected \[96, 64\]"),
        ("gptq", put("g_idx", lambda t: t[:9]), r"g_idx is torch.int32 \[9\], expected int32 \[64\]"),
        ("gptq", put("g_idx", lambda t: t + 1), "g_idx has a group outside the 2 of scales"),
        ("gptq", put("g_idx", lambda t: t - 1), "g_idx has a group outside the 2 of scales"),
        ("gptq", put("g_idx", Tensor.float), "g_idx is torch.float32"),
        ("gptq", put("qweight", lambda t: t[:7]), r"g_idx is torch.int32 \[64\], expected int32 \[56\]"),
        ("pack-quantized", drop("weight_shape"), "comes without model.layers.1.mlp.up_proj.weight_shape"),
        ("pack-quantized", drop("weight_packed"), "weight_scale comes without"),
        ("pack-quantized", put("weight_shape", lambda t: t * 2), r"weight_shape \[192, 128\] is not of"),
        ("pack-quantized", put("weight_shape", Tensor.float), r"weight_shape \[\] is not of"),
        ("pack-quantized", put("weight_shape", lambda t: t - t), r"weight_shape \[0, 0\] is not of"),
        ("pack-quantized", put("weight_packed", lambda t: t[:, :5]), "has 5 words of 64 columns"),
        ("pack-quantized", put("weight_packed", Tensor.long), "has dtype torch.int64, expected torch.int32"),
        ("pack-quantized", put("weight_scale", lambda t: t[:4]), r"weight_scale has shape \[4, 2\]"),
        ("pack-quantized", put("weight_scale", Tensor.int), "weight_scale has dtype torch.int32"),
        ("pack-quantized asymmetric", put("weight_zero_point", lambda t: t[:3]), "zero_point has shape"),
        ("int-quantized", put("weight", Tensor.float), "weight has dtype torch.float32, expected torch.int8"),
        ("int-quantized asymmetric", put("weight_zero_point", Tensor.int), "expected torch.int8"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused_by_name(
    name: str, edit: Edit, message: str, source: Path, tmp_path: Path
) -> None:
    config, write, _ = FORMATS[name]
    write_quantized(source, tmp_path / "model", config, write)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    with pytest.raises(ModelError, match=message):
        read_all(tmp_path / "model")


def read_all(path: Path) -> None:
    name, shape = f"{UP}.weight", (96, 64)
    with open_checkpoint(path) as checkpoint:
        if checkpoint.quant_format(name, shape) is not None:
            checkpoint.quantized(name, shape)
        checkpoint.tensor(name, shape)
        checkpoint.check_all_used()


def test_a_weight_in_floats_beside_its_quantised_one_is_refused(source: Path, tmp_path: Path) -> None:
    write_quantized(source, tmp_path / "model", AWQ, writer.awq)
    file = tmp_path / "model" / "model.safetensors"
    save_file(load_file(file) | {f"{UP}.weight": torch.zeros(96, 64)}, file)
    with pytest.raises(ModelError, match=f"{UP}.weight is there twice"):
        open_checkpoint(tmp_path / "model")
