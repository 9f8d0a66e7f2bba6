"""What `quantization` makes of a model's weights, and what of it is kept on disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from loraserve import _core
from loraserve.errors import ModelError
from loraserve.loader import LoadedModel, load_model, open_checkpoint, quantized_cache
from loraserve.loader.gguf_file import GgufFile
from loraserve.models.config import ModelConfig
from loraserve.models.decoder import Decoder
from loraserve.models.quantized import dequantize, format_of, quantize, to_arrays
from loraserve.models.weights import BuildDecoder
from torch import Tensor

from tests.loader import quantized_writer as writer
from tests.loader.gguf_writer import write_llama_gguf
from tests.loader.test_quantized_dirs import GPTQ
from tests.models.tiny import make_model, save_model

LAYER = "model.layers.0."


class Packed:
    """What a packer was given."""

    def __init__(self, parts: list[Any], bias: Tensor | None) -> None:
        self.parts = parts
        self.bias = bias
        self.in_features = int(parts[0].shape[1] if isinstance(parts[0], Tensor) else parts[0].in_features)
        self.out_features = sum(
            part.shape[0] if isinstance(part, Tensor) else part.out_features for part in parts
        )

    @property
    def is_quantized(self) -> bool:
        return isinstance(self.parts[0], _core.QuantizedWeight)

    def weight(self) -> Tensor:
        return torch.cat(
            [part.float() if isinstance(part, Tensor) else dequantize(part) for part in self.parts]
        )


class NotingPacker:
    dtype = torch.float32
    device = torch.device("cpu")

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> Packed:
        return Packed([weight], bias)

    def pack_quantized(self, parts: list[_core.QuantizedWeight], bias: Tensor | None = None) -> Packed:
        return Packed(list(parts), bias)


def load(path: Path, quantization: str | None, **settings: Any) -> LoadedModel:
    def place(config: ModelConfig, build: BuildDecoder) -> tuple[Decoder, int]:
        return build(NotingPacker(), 16), 16

    keeps = settings.pop("keeps_quantized", True)
    return load_model(
        path, torch.float32, place, quantization=quantization, keeps_quantized=keeps, **settings
    )


def linears(model: LoadedModel) -> list[Any]:
    return [model.decoder._embedding, model.decoder.lm_head, *model.decoder.linears()]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORASERVE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("llama with biases"), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    model = save_model(make_model("llama"), folder / "model")
    return write_llama_gguf(folder / "m.gguf", model, gguf.GGMLQuantizationType.Q8_0)


def test_a_gguf_files_weights_are_packed_as_they_are(gguf_file: Path) -> None:
    kept, dequantised = load(gguf_file, None), load(gguf_file, "none")
    assert (kept.quantization, dequantised.quantization) == ("q8_0", None)
    for linear, other in zip(linears(kept), linears(dequantised), strict=True):
        assert linear.is_quantized
        assert not other.is_quantized
        assert torch.equal(linear.weight(), other.weight())
    assert kept.weights_nbytes * 4 < dequantised.weights_nbytes * 1.1
    assert kept.fingerprint == dequantised.fingerprint


def test_the_method_of_a_checkpoint_may_be_named(gguf_file: Path, dense: Path, tmp_path: Path) -> None:
    assert load(gguf_file, "gguf").quantization == "q8_0"
    writer.write_quantized(dense, tmp_path / "gptq", GPTQ, writer.gptq)
    assert load(tmp_path / "gptq", "gptq").quantization == "gptq"
    with pytest.raises(ModelError, match=r"quantization is awq, .*gptq is of gptq: leave it away"):
        load(tmp_path / "gptq", "awq")
    with pytest.raises(ModelError, match="quantization is gptq, .* is of gguf"):
        load(gguf_file, "gptq")
    with pytest.raises(ModelError, match="quantization is awq, .* is not quantised"):
        load(dense, "awq")


def test_a_scale_that_is_no_number_names_its_tensor(gguf_file: Path, tmp_path: Path) -> None:
    with open_checkpoint(gguf_file) as checkpoint:
        assert isinstance(checkpoint, GgufFile)
        offset = checkpoint._file.tensors["blk.0.attn_q.weight"].offset
    content = bytearray(gguf_file.read_bytes())
    content[offset : offset + 2] = b"\xff\x7e"  # of float16, a NaN
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"self_attn\.q_proj\.weight can't be read: .* not finite"):
        load(tmp_path / "m.gguf", None)


def test_a_device_without_quantised_products_gets_dense_weights(gguf_file: Path, dense: Path) -> None:
    for quantization in (None, "gguf", "none"):
        model = load(gguf_file, quantization, keeps_quantized=False)
        assert model.quantization is None
        assert not any(linear.is_quantized for linear in linears(model))
    with pytest.raises(ModelError, match="quantization is int8, GPUs compute with dense weights"):
        load(dense, "int8", keeps_quantized=False)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_dense_weights_are_quantised_as_they_are_read(dense: Path, kind: Any) -> None:
    made, exact = load(dense, kind), load(dense, None)
    assert (made.quantization, exact.quantization) == (kind, None)
    for index, (linear, other) in enumerate(zip(linears(made), linears(exact), strict=True)):
        assert linear.is_quantized
        assert not other.is_quantized
        weight = dequantize(quantize(other.weight(), "int8" if index < 2 else kind))
        assert torch.equal(linear.weight(), weight)
        assert (linear.bias is None) == (other.bias is None)
        if linear.bias is not None:
            assert torch.equal(linear.bias, other.bias)
    assert made.weights_nbytes < exact.weights_nbytes / 3


def test_a_quantised_checkpoint_is_not_quantised_again(gguf_file: Path) -> None:
    with pytest.raises(ModelError, match=r"m.gguf is quantised already \(q8_0\): leave it away"):
        load(gguf_file, "int8")


def test_a_linear_with_a_dense_part_is_dense_and_the_log_says_so(
    dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = writer.write_quantized(dense, tmp_path / "model", GPTQ, writer.gptq, keep=["0.mlp.up_proj"])
    model = load(tmp_path / "model", None)
    assert [linear.is_quantized for linear in linears(model)] == [False] * 2 + [True] * 2 + [False] + [
        True
    ] * 5
    gate_up = model.decoder.layers[0].gate_up
    names = [f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight"]
    assert torch.equal(gate_up.weight(), torch.cat([expected[name] for name in names]))  # type: ignore[attr-defined]
    told = [record.message for record in caplog.records if "not quantised" in record.message]
    assert len(told) == 1
    assert f"1 of 8 linears are not quantised and take torch.float32 each: {names[0]};" in told[0]


def test_columns_that_are_no_groups_stay_dense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    path = save_model(make_model("llama"), tmp_path / "model")
    import json  # noqa: PLC0415

    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = tensor[:90].clone()
        elif "down_proj" in name:
            tensors[name] = tensor[:, :90].clone()
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text()) | {"intermediate_size": 90}
    (path / "config.json").write_text(json.dumps(config))
    model = load(path, "int4")
    assert [layer.down.is_quantized for layer in model.decoder.layers] == [False, False]  # type: ignore[attr-defined]
    assert model.decoder.layers[0].gate_up.is_quantized  # type: ignore[attr-defined]
    assert "2 of 8 linears are not quantised" in caplog.text


def test_a_second_start_reads_what_the_first_made(
    dense: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(dense, "int4")
    assert len(list(cache.glob("*/*.safetensors"))) == 2 + 2 * 7
    monkeypatch.setattr("loraserve.loader.packed_weights.quantize", None)
    second = load(dense, "int4")
    for linear, other in zip(linears(first), linears(second), strict=True):
        for part, kept in zip(linear.parts, other.parts, strict=True):
            assert format_of(part) == format_of(kept)
            for ours, theirs in zip(to_arrays(part), to_arrays(kept), strict=True):
                assert (ours is theirs is None) or torch.equal(ours, theirs)  # type: ignore[arg-type]


def test_another_kind_and_changed_files_are_kept_apart(dense: Path, cache: Path, tmp_path: Path) -> None:
    load(dense, "int4")
    load(dense, "int8")
    assert len(list(cache.iterdir())) == 2
    shutil.copytree(dense, tmp_path / "copy")
    load(tmp_path / "copy", "int8")
    assert len(list(cache.iterdir())) == 3
    (tmp_path / "copy" / "model.safetensors").touch()
    load(tmp_path / "copy", "int8")
    assert len(list(cache.iterdir())) == 4


def test_other_weights_of_the_same_size_and_time_are_kept_apart(
    dense: Path, cache: Path, tmp_path: Path
) -> None:
    """As an image built anew has them, whose files all bear one time."""
    model = tmp_path / "model"
    for factor in (1.0, 0.5):
        weights = make_model("llama")
        with torch.no_grad():
            for weight in weights.parameters():
                weight.mul_(factor)
        save_model(weights, model)
        os.utime(model / "model.safetensors", (1, 1))
        made = load(model, "int8")
    fresh = load(Path(shutil.copytree(model, tmp_path / "copy")), "int8")
    for linear, other in zip(linears(made), linears(fresh), strict=True):
        assert torch.equal(linear.weight(), other.weight())


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "swapped", "text"])
def test_a_damaged_file_is_made_again_with_a_warning(
    damage: str, dense: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = load(dense, "int8")
    files = sorted(cache.glob("*/*.safetensors"))
    whole = files[0].read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    other = next(file for file in files if file.stat().st_size != len(whole))
    made = {
        "cut": whole[:-9],
        "empty": b"",
        "flipped": bytes(flipped),
        "swapped": other.read_bytes(),
        "text": b"x" * 99,
    }
    files[0].write_bytes(made[damage])
    second = load(dense, "int8")
    assert caplog.text.count("is damaged, its weight is quantised again") == 1
    assert files[0].read_bytes() == whole
    for linear, again in zip(linears(first), linears(second), strict=True):
        assert torch.equal(linear.weight(), again.weight())


def test_a_cache_that_can_not_be_written_is_a_warning(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORASERVE_CACHE_DIR", str(tmp_path / "file"))
    assert load(dense, "int8").quantization == "int8"
    assert caplog.text.count("quantised weights are not kept for the next start") == 1


def test_models_not_used_for_longest_give_way(
    dense: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(dense, "int8")
    (oldest,) = cache.iterdir()
    load(dense, "int4")
    used = sum(file.stat().st_size for file in cache.glob("*/*"))
    monkeypatch.setattr(quantized_cache, "MAX_NBYTES", used + 1000)
    shutil.copytree(dense, tmp_path / "copy")
    load(tmp_path / "copy", "int4")
    assert not oldest.exists()
    assert len(list(cache.iterdir())) == 2
    assert sum(file.stat().st_size for file in cache.glob("*/*")) <= used + 1000


def test_no_partial_file_stays(dense: Path, cache: Path) -> None:
    load(dense, "int8")
    assert {file.suffix for file in cache.glob("*/*")} == {".safetensors"}


def test_a_weight_that_is_not_finite_is_named(dense: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    shutil.copytree(dense, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[f"{LAYER}mlp.down_proj.weight"][5, 3] = torch.inf
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ModelError, match=r"0.mlp.down_proj.weight can't be quantised to int8: .* in row 5"):
        load(tmp_path / "model", "int8")
