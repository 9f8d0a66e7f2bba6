"""What DoRA, biases and added tokens cost: the offline workload over each kind, in turns with plain ones."""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from adapter_files import write_adapters
from loraserve import LLM
from machine import describe
from safetensors.torch import load_file, save_file
from streams import greedy
from tqdm import tqdm
from workloads import VOCAB_SIZE, Workload

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HIDDEN = 576
NUM_ADDED_TOKENS = 4

Tensors = dict[str, torch.Tensor]


def main() -> None:
    """Prints throughput over that of plain adapters, turn by turn, and how long loads take."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=32, help="distinct ones, of 32 requests")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()
    workload = Workload()
    prompts, adapters = workload.prompts(), workload.adapters(options.adapters)
    seconds: dict[str, list[float]] = {kind: [] for kind in ("plain", *options.kinds)}
    loads: dict[str, float] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        llms = {
            kind: stack.enter_context(
                LLM("smollm2", make(directory / kind, kind, options), memory="1GiB", prefix_caching=False)
            )
            for kind in seconds
        }
        for kind, llm in llms.items():  # also loads what the turns use
            llm.generate(prompts, greedy(2), adapters, progress=False)
            loads[kind] = statistics.median(one.last_load_s for one in llm.adapters() if one.last_load_s)
        for _ in tqdm(range(options.turns), desc="turns", leave=False):
            for kind, llm in llms.items():
                begin = time.perf_counter()
                llm.generate(prompts, greedy(workload.new_tokens), adapters, progress=False)
                seconds[kind].append(time.perf_counter() - begin)
    results = {kind: result(kind, seconds, loads) for kind in seconds}
    for kind, values in results.items():
        print(f"{kind:12} {values['ratio']:.3f} of plain {values['ratios']}, load {values['load_s']:.3f} s")
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": describe(), "results": results}, indent=1))


def result(kind: str, seconds: dict[str, list[float]], loads: dict[str, float]) -> dict[str, Any]:
    """Ratios of throughput, turn by turn, each beside the plain adapters' of the same turn."""
    pairs = zip(seconds["plain"], seconds[kind], strict=True)
    ratios = sorted(round(plain / own, 3) for plain, own in pairs)
    return {"ratio": statistics.median(ratios), "ratios": ratios, "load_s": loads[kind]}


def make(directory: Path, kind: str, options: argparse.Namespace) -> dict[str, str]:
    """The plain adapters, and what the kind adds to them."""
    paths = write_adapters(directory, options.adapters, options.rank)
    for path in map(Path, paths.values()) if kind != "plain" else ():
        tensors, config = load_file(path / WEIGHTS), json.loads((path / CONFIG).read_text())
        KINDS[kind](tensors, config)
        save_file(tensors, path / WEIGHTS)
        (path / CONFIG).write_text(json.dumps(config))
    return paths


def add_dora(tensors: Tensors, config: dict[str, Any]) -> None:
    config["use_dora"] = True
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        magnitude = 5.0 + torch.rand(len(tensors[name]))
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = magnitude


def add_bias(tensors: Tensors, config: dict[str, Any]) -> None:
    config["lora_bias"] = True
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        tensors[name.replace("weight", "bias")] = 0.01 * torch.randn(len(tensors[name]))


def add_tokens(tensors: Tensors, config: dict[str, Any]) -> None:
    added = list(range(VOCAB_SIZE, VOCAB_SIZE + NUM_ADDED_TOKENS))
    config["trainable_token_indices"] = {"embed_tokens": added}
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    tensors[name] = 0.1 * torch.randn(NUM_ADDED_TOKENS, HIDDEN)


KINDS: dict[str, Callable[[Tensors, dict[str, Any]], None]] = {
    "dora": add_dora,
    "lora_bias": add_bias,
    "added_tokens": add_tokens,
}


if __name__ == "__main__":
    main()
