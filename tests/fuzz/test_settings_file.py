"""Mutated YAML files of settings: read or refused in one typed line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from loraserve.settings.load import load_settings

from tests.fuzz.bounds import Campaign
from tests.fuzz.mutation import mutate_bytes, mutate_json

SETTINGS: dict[str, Any] = {
    "model": "smollm2",
    "adapters": {"sql": "./sql", "pirate": {"repo": "owner/name", "revision": "main", "pin": True}},
    "adapter_root": ["./adapters", "~/more"],
    "keys": [
        {"name": "sales", "secret": "s3cret", "adapters": ["sql", "p*"], "requests_per_minute": 60},
        {"name": "root", "secret": "other", "admin": True, "max_concurrent": 3},
    ],
    "memory": "2GiB",
    "max_lora_rank": 32,
    "max_model_len": 4096,
    "host": "127.0.0.1",
    "http_port": 8000,
    "grpc_port": "off",
    "cors_origin": ["https://app.example"],
    "served_model_name": ["base", "model"],
}
BASETEN: dict[str, Any] = {
    "model_name": "chat",
    "trt_llm": {
        "build": {
            "base_model": "llama",
            "checkpoint_repository": {"repo": "owner/name", "revision": "main", "source": "HF"},
            "lora_adapters": {"sql": {"repo": "owner/sql", "source": "HF"}},
            "lora_configuration": {"max_lora_rank": 64, "lora_target_modules": ["attn_q"]},
            "max_seq_len": 4096,
            "max_batch_size": 32,
        },
        "runtime": {"served_model_name": "base"},
    },
}
# Aliases, merges, tags, and numbers that YAML alone knows.
SCRAPS = (
    b"&a [*a, *a]",
    b"<<: *a",
    b"!!python/object:x {}",
    b"0x" + b"f" * 5000,
    b"1:60:60",
    b"? [a]\n: b",
    b"\t",
)


def read(path: Path) -> None:
    """As the server reads it, secrets too."""
    settings = load_settings({}, {}, path).settings
    for key in settings.keys:
        key.api_key()


def test_mutated_values_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    campaign = Campaign("values of settings")
    for number, random in campaign.cases():
        text = yaml.dump(mutate_json(random, random.choice((SETTINGS, BASETEN))), allow_unicode=True)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        campaign.check(number, lambda: read(path))
    campaign.finish()


def test_mutated_bytes_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    texts = [yaml.dump(value).encode() for value in (SETTINGS, BASETEN)]
    campaign = Campaign("bytes of settings")
    for number, random in campaign.cases():
        text = mutate_bytes(random, random.choice(texts))
        if random.random() < 0.3:
            at = random.randrange(len(text) + 1)
            text = text[:at] + random.choice(SCRAPS) + text[at:]
        path.write_bytes(text)
        campaign.check(number, lambda: read(path))
    campaign.finish()
