"""Mutated adapters in other containers, and indexes of shards: served, or refused in one typed line."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from loraserve import LLM, SamplingParams
from safetensors.torch import load_file, save_file

from tests.adapters.container_writer import read_peft, write_gguf, write_trtllm
from tests.fuzz import gguf_bytes, model_files
from tests.fuzz.bounds import Campaign
from tests.fuzz.mutation import mutate_bytes, mutate_json, to_json
from tests.fuzz.test_adapter_directory import SHAPE, serve
from tests.peft_writer import write_adapter

HEADS = {"self_attn.q_proj": 2, "self_attn.k_proj": 1}
OUT_FEATURES = {"q_proj": 32, "k_proj": 16, "v_proj": 16}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = model_files.write_directory(tmp_path_factory.mktemp("fuzz") / "model")
    with LLM(str(path), dtype="float32", memory="1MiB", num_threads=1) as llm:
        yield llm


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "peft", SHAPE, rank=2, modules=("q_proj", "v_proj", "down_proj"))


def run(kind: str, llm: LLM, path: Path, file: Path, mutate: Callable[[Random], bytes]) -> None:
    """Serves `path` whole, and after each mutation of `file`."""
    serve(llm, path)
    prompts, params = [[3, 4, 5]], SamplingParams(max_tokens=4, temperature=0.0)
    expected = llm.generate(prompts, params)[0].token_ids
    campaign = Campaign(kind)
    for number, random in campaign.cases():
        file.write_bytes(mutate(random))
        campaign.check(number, lambda: serve(llm, path))
    campaign.finish()
    assert llm.adapters() == []
    assert llm.generate(prompts, params)[0].token_ids == expected


def test_mutated_bytes_of_a_gguf_adapter_are_served_or_refused(llm: LLM, peft: Path, tmp_path: Path) -> None:
    file = write_gguf(peft, tmp_path / "x.gguf", HEADS)
    whole = file.read_bytes()
    run("bytes of a GGUF adapter", llm, file, file, lambda random: mutate_bytes(random, whole, 1024))


def test_mutated_values_of_a_gguf_adapter_are_served_or_refused(llm: LLM, peft: Path, tmp_path: Path) -> None:
    _, modules = read_peft(peft)
    rows: list[Any] = []
    blocks, offset = [], 0
    for (layer, module), halves in modules.items():
        for half, tensor in zip(("lora_a", "lora_b"), halves, strict=True):
            name = gguf_bytes.gguf_name(f"model.layers.{layer}.{module}.weight")
            rows.append([f"{name}.{half}", list(reversed(tensor.shape)), gguf_bytes.F32, offset])
            content = tensor.numpy().tobytes()
            blocks.append(content + bytes(-len(content) % gguf_bytes.ALIGNMENT))
            offset += len(blocks[-1])
    metadata = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
    }
    description = {"version": 3, "metadata": metadata, "tensors": rows}
    data = b"".join(blocks)

    def write(value: Any) -> bytes:
        return gguf_bytes.padded(gguf_bytes.header(value)) + data

    file = tmp_path / "x.gguf"
    file.write_bytes(write(description))
    run(
        "values of a GGUF adapter",
        llm,
        file,
        file,
        lambda random: write(mutate_json(random, description)),
    )


@pytest.mark.parametrize("name", ["model.lora_config.npy", "model.lora_weights.npy"])
def test_mutated_bytes_of_an_array_are_served_or_refused(
    name: str, llm: LLM, peft: Path, tmp_path: Path
) -> None:
    pair = write_trtllm(peft, tmp_path / "pair", out_features=OUT_FEATURES)
    whole = (pair / name).read_bytes()
    num_header = struct.unpack_from("<H", whole, 8)[0] + 10
    num_interesting = len(whole) if "config" in name else num_header
    run(
        f"bytes of {name}",
        llm,
        pair,
        pair / name,
        lambda random: mutate_bytes(random, whole, num_interesting),
    )


def test_mutated_indexes_of_shards_are_served_or_refused(llm: LLM, peft: Path) -> None:
    tensors = load_file(peft / "adapter_model.safetensors")
    (peft / "adapter_model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, peft / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    path = peft / "adapter_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    run("an index of shards", llm, peft, path, lambda random: to_json(mutate_json(random, index)))
