"""Costs of Llama-3-8B on the GPUs it was measured on, from the tables of docs/gpu; writes what `plan` ships.

Of a step that decodes: rows, whether any adapter is in it, bytes of its adapters, rows that adapters act on.
Of a prompt, in chunks of 2,048: the same, and pairs that attention looks at. What each costs is fitted at
once, errors counted as shares of the times. Context tokens cost what attention took for 64 rows of 2,048.

    python benches/fit_costs.py
"""

import argparse
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
from loraserve.config import EngineConfig
from loraserve.planning.costs import Costs, LoadCosts, StepCosts
from loraserve.planning.fit import nnls
from loraserve.planning.models import planned_model

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "python/loraserve/planning/measured"
RANK = 16
MODEL = planned_model(EngineConfig(model="llama-3-8b"))
NUM_LAYERS, ADAPTER_NBYTES = MODEL.config.num_layers, MODEL.adapter_nbytes(RANK)
CHUNK = 2048
CONTEXT = 128 + 32  # of the decoding rows, about their middle
GPUS = {"h100": ("NVIDIA H100 80GB", "docs/gpu/h100"), "h200": ("NVIDIA H200", "docs/gpu")}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for name, (hardware, folder) in GPUS.items():
        costs = of_tables(hardware, folder)
        MEASURED.mkdir(exist_ok=True)
        costs.write(MEASURED / f"{name}.json")
        print(f"{name}: {asdict(costs.steps)}, mean error {costs.error:.1%}, loads {costs.loads}")


def of_tables(hardware: str, folder: str) -> Costs:
    """Of `engine.md` and of attention in `kernels.md`."""
    text = (ROOT / folder / "engine.md").read_text()
    kernels = (ROOT / folder / "kernels.md").read_text()
    attention = re.search(r"attention \| 64 \| context 2048 \| ([\d.]+)", kernels)
    context_token = float(attention[1]) * 1e-6 * NUM_LAYERS / (64 * 2048)
    points, seconds = [], []
    for rows, adapters, ms in re.findall(r"^\| (\d+) \| (\d+) \| greedy \| ([\d.]+) \|", text, re.MULTILINE):
        num_rows, num_adapters = int(rows), int(adapters)
        points.append(decode(num_rows, num_adapters))
        seconds.append(float(ms) / 1e3 - context_token * num_rows * CONTEXT)
    for tokens, adapter, first in re.findall(r"^\| (\d+) \| (none|one) \| ([\d.]+) \|", text, re.MULTILINE):
        points.append(prompt(int(tokens), has_adapter=adapter == "one"))
        seconds.append(float(first))
    matrix, times = np.array(points, dtype=float), np.array(seconds)
    solved = nnls(matrix / times[:, None], np.ones_like(times))
    base, row, any_adapter, adapter_byte, adapter_row, pair = solved.tolist()
    after = [
        float(s)
        for s in re.search(r"first tokens of the new ones after ([\d.]+) to ([\d.]+) s", text).groups()
    ]
    return Costs(
        hardware=hardware,
        model=MODEL.name,
        amounts=MODEL.amounts,
        basis=f"measured on one {hardware} on 2026-11-26 with random weights ({folder}): {len(times)} "
        "points, greedy, bfloat16, adapters of rank 16",
        steps=StepCosts(
            rows=((1.0, base + row), (float(CHUNK), base + row * CHUNK)),
            prompt_pair=pair,
            context_token=context_token,
            any_adapter=any_adapter,
            adapter_byte=adapter_byte,
            adapter_row=adapter_row,
        ),
        # Eight loads on two threads: each pair takes a quarter of the time to the last.
        loads=LoadCosts(lanes=2, latency_s=0.0, bytes_per_s=ADAPTER_NBYTES / (after[1] / 4)),
        runs_ahead=True,
        error=float(np.mean(np.abs(matrix @ solved / times - 1))),
        total_error=float((matrix @ solved).sum() / times.sum() - 1),
        num_steps=len(times),
    )


def decode(rows: int, adapters: int) -> list[float]:
    """[steps, rows, steps with an adapter, bytes of adapters, rows of adapters, pairs] of one step."""
    acted = rows if adapters else 0
    return [1, rows, min(adapters, 1), adapters * ADAPTER_NBYTES, acted, 0]


def prompt(tokens: int, *, has_adapter: bool) -> list[float]:
    """The same of a prompt's steps together."""
    steps = -(-tokens // CHUNK)
    pairs = tokens * (tokens + 1) / 2
    used = steps if has_adapter else 0
    return [steps, tokens, used, used * ADAPTER_NBYTES, tokens if has_adapter else 0, pairs]


if __name__ == "__main__":
    main()
