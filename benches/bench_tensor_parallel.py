"""One process beside ranks that share the model out: `python benches/bench_tensor_parallel.py`.

A model with random weights, made in a temporary directory, runs in one process on one core, in two ranks with
one core each, and in one process on both. Milliseconds of a decode step and of a prompt, and what all
processes together had of the cores for it, the least of the rounds; each is asked in its turn.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import numpy as np
import numpy.typing as npt
import psutil  # type: ignore[import-untyped]
import tokenizers
import torch
from adapter_files import write_adapters
from loraserve import LLM, SamplingParams
from loraserve.models.config import ModelConfig
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
NUM_ADAPTERS = 8
RANK = 16
PROMPT_TOKENS = 512
STEPS = 24


@dataclass(frozen=True)
class Setup:
    """How many processes with how many threads together."""

    name: str
    ranks: int
    threads: int


SETUPS = [
    Setup("1 process, 1 core", 1, 1),
    Setup("2 ranks, 1 core each", 2, 2),
    Setup("1 process, 2 cores", 1, 2),
]


def make_model(path: Path) -> Path:
    """Random weights in bfloat16, and a word for each token."""
    generator = torch.Generator().manual_seed(0)
    config = ModelConfig.from_hf(CONFIG)
    shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    for layer in range(config.num_layers):
        for module, _, num_ins, num_outs, _ in config.base_shape()[1]:
            shapes[f"model.layers.{layer}.{module}.weight"] = (num_outs, num_ins)
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.03, generator=generator)
        for name, shape in shapes.items()
    }
    norms = [f"model.layers.{layer}.{name}" for layer in range(config.num_layers) for name in NORMS]
    tensors |= {f"{name}.weight": torch.ones(config.hidden_size, dtype=torch.bfloat16) for name in norms}
    tensors["model.norm.weight"] = torch.ones(config.hidden_size, dtype=torch.bfloat16)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    words = tokenizers.models.WordLevel(
        {f"w{index}": index for index in range(config.vocab_size)}, unk_token="w0"
    )
    tokenizers.Tokenizer(words).save(str(path / "tokenizer.json"))
    return path


NORMS = ("input_layernorm", "post_attention_layernorm")


def prompts_of(count: int, length: int, turn: int) -> list[list[int]]:
    """New ones every turn, which no cache has."""
    first = 1000 + 7919 * turn
    return [[(first + 131 * index + place) % 30000 for place in range(length)] for index in range(count)]


def cores_s() -> float:
    """What this process and its ranks have had of the cores."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def call_ms(llm: LLM, prompts: list[list[int]], num_tokens: int, adapters: Any) -> npt.NDArray[np.float64]:
    """Of one call, on the clock and of the cores."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    began = np.array([time.perf_counter(), cores_s()])
    llm.generate(prompts, params, adapters)
    return 1e3 * (np.array([time.perf_counter(), cores_s()]) - began)


def measure(llm: LLM, kind: str, count: int, rounds: range) -> npt.NDArray[np.float64]:
    """Milliseconds of a step, or of a prompt: on the clock and of the cores."""
    adapters = [f"adapter-{index % NUM_ADAPTERS}" for index in range(count)] if "adapters" in kind else None
    if kind == "prompt":
        calls = [call_ms(llm, prompts_of(count, PROMPT_TOKENS, turn), 1, None) for turn in rounds]
        return np.min(calls, axis=0)
    prompts = [prompts_of(count, 16, turn) for turn in rounds]
    first = np.min([call_ms(llm, some, 1, adapters) for some in prompts], axis=0)
    whole = np.min([call_ms(llm, some, 1 + STEPS, adapters) for some in prompts], axis=0)
    return (whole - first) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    cases = [("prompt", 1), ("decode", 1), ("decode", 8), ("decode, adapters", 8), ("decode", 32)]
    print(machine.title())
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = make_model(Path(folder))
        config = ModelConfig.from_hf(CONFIG)
        modules = {path: (num_ins, num_outs) for path, _, num_ins, num_outs, _ in config.base_shape()[1]}
        adapters = write_adapters(Path(folder), NUM_ADAPTERS, RANK, modules, config.num_layers)
        engines = [
            stack.enter_context(
                LLM(
                    str(model),
                    adapters,
                    device="cpu",
                    memory="512MiB",
                    num_threads=setup.threads,
                    tensor_parallel_size=setup.ranks,
                )
            )
            for setup in SETUPS
        ]
        print(
            "| ms, least of the rounds | "
            + " | ".join(setup.name for setup in SETUPS)
            + " | ranks / 1 core |"
        )
        print("|---|" + "---|" * (len(SETUPS) + 1))
        for number, (kind, count) in enumerate(cases):
            turns = range(100 * number, 100 * number + rounds)
            least = [measure(llm, kind, count, turns) for llm in engines]
            cells = " | ".join(f"{clock:.1f} ({cores:.1f})" for clock, cores in least)
            clock, cores = least[0] / least[1]
            print(f"| {kind} of {count} | {cells} | {clock:.2f} times as fast ({cores:.2f}) |", flush=True)


if __name__ == "__main__":
    main()
