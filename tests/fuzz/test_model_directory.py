"""Mutated files of a Hugging Face directory, one at a time: it is served or refused in one typed line."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import pytest
from safetensors.torch import load_file, save_file

from tests.fuzz import model_files
from tests.fuzz.bounds import Campaign
from tests.fuzz.mutation import mutate_bytes, mutate_json, to_json
from tests.loader.quantized_writer import write_quantized
from tests.loader.test_quantized_dirs import FORMATS

JSON_FILES = (
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
SHARD = "model-00001-of-00002.safetensors"
# special_tokens_map.json and added_tokens.json count only without this
LISTED_TOKENS = "added_tokens_decoder"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = model_files.write_directory(tmp_path / "model")
    model_files.serve(path)
    return path


@pytest.mark.parametrize("name", JSON_FILES)
def test_mutated_values_of_a_json_file_are_served_or_refused(name: str, directory: Path) -> None:
    if name in ("added_tokens.json", "special_tokens_map.json"):
        config = {key: one for key, one in model_files.TOKENIZER_CONFIG.items() if key != LISTED_TOKENS}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        model_files.serve(directory)
    value = json.loads((directory / name).read_bytes())
    _run(f"values of {name}", directory, directory / name, lambda random: to_json(mutate_json(random, value)))


@pytest.mark.parametrize("name", JSON_FILES)
def test_mutated_bytes_of_a_json_file_are_served_or_refused(name: str, directory: Path) -> None:
    whole = (directory / name).read_bytes()
    _run(f"bytes of {name}", directory, directory / name, lambda random: mutate_bytes(random, whole))


def test_mutated_bytes_of_a_safetensors_file_are_served_or_refused(directory: Path) -> None:
    whole = (directory / SHARD).read_bytes()
    (num_header,) = struct.unpack_from("<Q", whole)
    mutate = partial(mutate_bytes, data=whole, num_interesting=8 + num_header)
    _run("bytes of safetensors", directory, directory / SHARD, mutate)


def test_mutated_headers_of_a_safetensors_file_are_served_or_refused(directory: Path) -> None:
    whole = (directory / SHARD).read_bytes()
    (num_header,) = struct.unpack_from("<Q", whole)
    header, data = json.loads(whole[8 : 8 + num_header]), whole[8 + num_header :]

    def mutate(random: Random) -> bytes:
        text = to_json(mutate_json(random, header))
        return struct.pack("<Q", len(text)) + text + data

    _run("header of safetensors", directory, directory / SHARD, mutate)


@pytest.fixture(params=["awq", "gptq", "int-quantized asymmetric", "pack-quantized asymmetric"])
def quantised(request: pytest.FixtureRequest, directory: Path, tmp_path: Path) -> Path:
    shards = sorted(directory.glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for file in [*shards, directory / "model.safetensors.index.json"]:
        file.unlink()
    save_file(tensors, directory / "model.safetensors")
    config, write, _ = FORMATS[request.param]
    target = tmp_path / request.param
    write_quantized(directory, target, config, partial(write, group=16))
    model_files.serve(target)
    return target


def test_mutated_ways_to_quantise_are_served_or_refused(quantised: Path) -> None:
    config = json.loads((quantised / "config.json").read_bytes())

    def mutate(random: Random) -> bytes:
        changed = mutate_json(random, config["quantization_config"])
        return to_json({**config, "quantization_config": changed})

    _run(f"quantization_config of {quantised.name}", quantised, quantised / "config.json", mutate)


def test_mutated_headers_of_quantised_weights_are_served_or_refused(quantised: Path) -> None:
    whole = (quantised / "model.safetensors").read_bytes()
    (num_header,) = struct.unpack_from("<Q", whole)
    header, data = json.loads(whole[8 : 8 + num_header]), whole[8 + num_header :]

    def mutate(random: Random) -> bytes:
        text = to_json(mutate_json(random, header))
        return struct.pack("<Q", len(text)) + text + data

    _run(f"header of {quantised.name}", quantised, quantised / "model.safetensors", mutate)


def test_mutated_bytes_of_quantised_weights_are_served_or_refused(quantised: Path) -> None:
    whole = (quantised / "model.safetensors").read_bytes()
    mutate = partial(mutate_bytes, data=whole)
    _run(f"weights of {quantised.name}", quantised, quantised / "model.safetensors", mutate)


def test_mutated_chat_templates_are_served_or_refused(directory: Path) -> None:
    template = b"{% for m in messages %}<s>{{ m['role'] }}: {{ m.content | trim }}{% endfor %}"
    _run(
        "chat_template.jinja",
        directory,
        directory / "chat_template.jinja",
        partial(mutate_bytes, data=template),
    )


def _run(kind: str, directory: Path, file: Path, mutate: Callable[[Random], bytes]) -> None:
    campaign = Campaign(kind)
    for number, random in campaign.cases():
        file.write_bytes(mutate(random))
        campaign.check(number, lambda: model_files.serve(directory))
    campaign.finish(both=False)
