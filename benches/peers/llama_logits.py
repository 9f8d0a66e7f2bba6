"""llama.cpp's distribution over the whole vocabulary after prefixes of texts, from its server.

It gives logarithms of probabilities, of those that float32 can hold; others come as `FLOOR` here.
"""

import os
from pathlib import Path

import gguf_models
import orjson
import torch
from llama_server import LlamaServer

CONTEXT = 512
FLOOR = -104.0  # about the logarithm of the smallest float32


def logits(data: Path, gguf_type: str, texts: list[list[int]], step: int, venvs: Path) -> torch.Tensor:
    """After each `step` tokens of each text: [positions, vocabulary], on `gguf_models`' file of this type."""
    options: dict[str, object] = {
        "--model": gguf_models.ensure(data, gguf_type, venvs),
        "--threads": os.cpu_count(),
        "--parallel": 1,
        "--ctx-size": CONTEXT,
        "--cache-type-k": "f32",
        "--cache-type-v": "f32",
        "--flash-attn": "off",
    }
    server = LlamaServer(gguf_models.llama_cpp_program("llama-server", venvs), options)
    try:
        rows = [row(server, text[:end]) for text in texts for end in range(step, len(text) + 1, step)]
    finally:
        server.close()
    return torch.stack(rows)


def row(server: LlamaServer, prefix: list[int]) -> torch.Tensor:
    body = {
        "prompt": prefix,
        "n_predict": 1,
        "temperature": 0,
        "samplers": ["temperature"],
        "cache_prompt": True,
        "n_probs": 10**6,  # as many as there are
    }
    answer = orjson.loads(server.post(body).read())
    return from_entries(answer["completion_probabilities"][0]["top_logprobs"])


def from_entries(entries: list[dict[str, float]]) -> torch.Tensor:
    """[vocabulary] from one entry a token, in any order. Raises ValueError if a token has none or two."""
    ids = torch.tensor([entry["id"] for entry in entries])
    if not torch.equal(ids.sort().values, torch.arange(len(entries))):
        raise ValueError(f"{len(entries)} tokens aren't all that there are")
    values = torch.full((len(entries),), FLOOR)
    values[ids] = torch.tensor([entry["logprob"] for entry in entries]).clamp(min=FLOOR)
    return values
