"""Mutated files of adapters, loaded into one engine: each is served, or refused in one typed line."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loraserve import LLM, SamplingParams
from loraserve.errors import AdapterFormatError

from tests.fuzz import model_files
from tests.fuzz.bounds import Campaign
from tests.fuzz.mutation import mutate_bytes, mutate_json, to_json
from tests.peft_writer import llama_shape, write_adapter

SHAPE = llama_shape(
    model_files.NUM_LAYERS,
    hidden=model_files.HIDDEN,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    intermediate=model_files.INTERMEDIATE,
)
MANIFEST: dict[str, Any] = {
    "description": "an adapter",
    "system_prompt": "be brief",
    "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}",
    "stop": ["x", "yz"],
    "sampling": {
        "temperature": 0.5,
        "max_tokens": 2,
        "top_k": 3,
        "top_p": 0.9,
        "logit_bias": {"3": 1.0},
        "stop_token_ids": [4],
        "seed": 1,
    },
    "json_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0}, "b": {"enum": ["x", 1]}},
        "required": ["a"],
    },
}
PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 4, "(k|v)_proj": 2},
    "alpha_pattern": {"q_proj": 8, ".*\\.v_proj": 3.5},
    "exclude_modules": ["lm_head"],
    "layers_pattern": ["layers"],
    "revision": None,
}
# Read to say what differs from the base model, and never used.
BESIDE = {
    "generation_config.json": model_files.GENERATION_CONFIG,
    "special_tokens_map.json": model_files.SPECIAL_TOKENS_MAP,
    "tokenizer_config.json": model_files.TOKENIZER_CONFIG,
}
CHAT = [[{"role": "user", "content": "ab"}]]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = model_files.write_directory(tmp_path_factory.mktemp("fuzz") / "model")
    with LLM(str(path), dtype="float32", memory="1MiB", num_threads=1) as llm:
        yield llm


@pytest.fixture
def directory(tmp_path: Path, llm: LLM) -> Path:
    path = write_adapter(tmp_path / "adapter", SHAPE, rank=2, modules=("q_proj", "v_proj", "down_proj"))
    for name, value in {"loraserve.json": MANIFEST, **BESIDE}.items():
        (path / name).write_text(json.dumps(value))
    (path / "tokenizer.json").write_text(model_files.make_tokenizer().to_str())
    serve(llm, path)
    return path


def serve(llm: LLM, path: Path) -> None:
    """Loads, uses and unloads an adapter."""
    llm.load_adapter("a", str(path))
    try:
        llm.generate([[3, 4]], SamplingParams(max_tokens=2), adapter="a")
        llm.chat(CHAT, SamplingParams(max_tokens=2), adapter="a")
    finally:
        llm.unload_adapter("a")


@pytest.mark.parametrize("name", sorted(["loraserve.json", "adapter_config.json", "tokenizer.json", *BESIDE]))
def test_mutated_values_of_a_json_file_are_served_or_refused(name: str, llm: LLM, directory: Path) -> None:
    value = json.loads((directory / name).read_bytes())
    if name == "adapter_config.json":
        value |= PATTERNS
    kind = f"values of an adapter's {name}"
    is_read = name in ("adapter_config.json", "loraserve.json")
    _run(kind, llm, directory / name, lambda random: to_json(mutate_json(random, value)), both=is_read)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "loraserve.json"])
def test_mutated_bytes_of_a_file_are_served_or_refused(name: str, llm: LLM, directory: Path) -> None:
    whole = (directory / name).read_bytes()
    is_json = name.endswith(".json")
    num_header = None if is_json else 8 + struct.unpack_from("<Q", whole)[0]
    _run(
        f"bytes of an adapter's {name}",
        llm,
        directory / name,
        lambda random: mutate_bytes(random, whole, num_header),
    )


@pytest.mark.parametrize("feature", ["lora_bias", "use_dora"])
def test_mutated_weights_with_gains_and_shifts_are_served_or_refused(
    feature: str, llm: LLM, tmp_path: Path
) -> None:
    path = write_adapter(tmp_path / "adapter", SHAPE, rank=2, **{feature: True})
    serve(llm, path)
    file = path / "adapter_model.safetensors"
    whole = file.read_bytes()
    (num_header,) = struct.unpack_from("<Q", whole)
    kind = f"bytes of weights with {feature}"
    _run(kind, llm, file, lambda random: mutate_bytes(random, whole, 8 + num_header))


def test_mutated_headers_of_its_weights_are_served_or_refused(llm: LLM, directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    whole = file.read_bytes()
    (num_header,) = struct.unpack_from("<Q", whole)
    header, data = json.loads(whole[8 : 8 + num_header]), whole[8 + num_header :]

    def mutate(random: Any) -> bytes:
        text = to_json(mutate_json(random, header))
        return struct.pack("<Q", len(text)) + text + data

    _run("header of an adapter's weights", llm, file, mutate)


def test_a_path_with_a_zero_byte_is_refused(llm: LLM) -> None:
    with pytest.raises(AdapterFormatError, match="can't be read"):
        llm.load_adapter("a", "a\0b")


def _run(kind: str, llm: LLM, file: Path, mutate: Any, *, both: bool = True) -> None:
    prompts, params = [[3, 4, 5]], SamplingParams(max_tokens=4, temperature=0.0)
    expected = llm.generate(prompts, params)[0].token_ids
    campaign = Campaign(kind)
    for number, random in campaign.cases():
        file.write_bytes(mutate(random))
        campaign.check(number, lambda: serve(llm, file.parent))
    campaign.finish(both=both)
    assert llm.adapters() == []
    assert llm.generate(prompts, params)[0].token_ids == expected
