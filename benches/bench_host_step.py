"""What the host does for a step on a device that answers at once: schedule, launch, sample, commit, deliver.

A backend that computes nothing gives every row the same few logits. As many requests as rows stream through
an `AsyncEngine`, each on one of the adapters, so that a step is one token for every request. Milliseconds a
step are CPU time, of the engine's thread and of the whole process: not the clock, so that a busy machine
changes little. What the engine's thread takes beyond the device's own time for a step is lost; the rest runs
beside it. With `--sampler host` the CPU's own sampler is in it.

The loop falls behind a device that answers at once, and then reads several deltas at a wake-up. With
`--device-ms` a step takes as long, asleep, and each delta of each stream has a wake-up of its own.

    python benches/bench_host_step.py
    python benches/bench_host_step.py --rows 256 --steps 200 --profile engine
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import dataclasses
import gc
import pstats
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import loraserve.engine.model_runner
import machine
import numpy as np
import torch
from adapter_files import write_adapters
from loraserve import AsyncEngine, EngineConfig, SamplingParams, _core
from loraserve.async_engine import RequestStream
from loraserve.backends.base import PlacedModel
from loraserve.backends.cpu.backend import CpuBackend
from loraserve.engine.engine import Engine
from loraserve.loader import default_model_path
from loraserve.models.config import ModelConfig
from loraserve.models.decoder import Decoder
from loraserve.models.ops import KvGeometry
from loraserve.models.weights import BuildDecoder
from loraserve.request import GenerateRequest
from loraserve.sampling.sampler import Sampler

CASES = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "top-p 0.95": {"top_p": 0.95},
    "penalty, 5 logprobs": {"presence_penalty": 0.1, "logprobs": 5},
}
PROMPT_TOKENS = 16
WARM_STEPS = 10


class InstantRows:
    """What a device has sampled: the last token of the vocabulary for each row."""

    def __init__(self, num_rows: int, vocab_size: int, device_s: float) -> None:
        self._device_s = device_s
        self.token_ids = np.full(num_rows, vocab_size - 1, dtype=np.int32)
        self.is_finite = np.ones(num_rows, dtype=np.bool_)
        self.logprobs = [None] * num_rows

    def wait(self) -> InstantRows:
        """These, as `_core.PendingSamples`."""
        if self._device_s:
            time.sleep(self._device_s)
        return self


class InstantBackend(CpuBackend):
    """Gives every row the same `vocab_size` logits, at once."""

    vocab_size = 259
    samples_at_once = True
    device_s = 0.0

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, torch.bfloat16)
        self._logits: dict[int, torch.Tensor] = {}  # by the number of rows

    def place(self, model: ModelConfig, geometry: KvGeometry, build: BuildDecoder) -> PlacedModel:
        placed = super().place(model, geometry, build)
        if self.samples_at_once:
            ops: Any = placed.ops
            ops.sample = lambda _, arrays: InstantRows(arrays.num_rows, self.vocab_size, self.device_s)
        return placed

    def logits(self, decoder: Decoder, batch: _core.Batch) -> torch.Tensor:
        if batch.num_samples not in self._logits:
            row = torch.linspace(0.0, 4.0, self.vocab_size)
            self._logits[batch.num_samples] = row.repeat(batch.num_samples, 1)
        return self._logits[batch.num_samples]


class StepClock:
    """CPU seconds of the engine's thread and of the process in each step; holds steps back until told."""

    def __init__(self) -> None:
        self.engine_s: list[float] = []
        self.process_s: list[float] = []
        self.profile: cProfile.Profile | None = None
        self.is_held = False

    def install(self) -> None:
        step = Engine.step

        def timed(engine: Engine) -> bool:
            if self.is_held:
                return False
            started, began = time.thread_time(), time.process_time()
            if self.profile is not None:
                self.profile.enable()
            is_busy = step(engine)
            if self.profile is not None:
                self.profile.disable()
            if is_busy:
                self.engine_s.append(time.thread_time() - started)
                self.process_s.append(began)
            return is_busy

        Engine.step = timed  # type: ignore[method-assign]


async def stream(
    engine: AsyncEngine, clock: StepClock, rows: int, adapters: int, params: SamplingParams
) -> None:
    """As many requests as rows, begun together and read to their ends."""

    async def read(stream: RequestStream) -> None:
        async for _ in stream:
            pass

    clock.is_held = True
    streams = []
    for index in range(rows):
        name = f"adapter-{index % adapters}" if adapters else None
        prompt = list(range(100, 100 + PROMPT_TOKENS))
        streams.append(await engine.submit(GenerateRequest(prompt=prompt, params=params, adapter=name)))
    clock.is_held = False
    engine._engine._wake.set()
    await asyncio.gather(*map(read, streams))


async def measure(engine: AsyncEngine, clock: StepClock, args: argparse.Namespace) -> None:
    for case, sampling in CASES.items():
        params = SamplingParams(max_tokens=args.steps + WARM_STEPS, ignore_eos=True, seed=1, **sampling)
        await stream(engine, clock, args.rows, args.adapters, dataclasses.replace(params, max_tokens=4))
        clock.engine_s, clock.process_s = [], []
        if args.profile == "engine":
            clock.profile = cProfile.Profile()
        loop_profile = cProfile.Profile() if args.profile == "loop" else None
        if loop_profile is not None:
            loop_profile.enable()
        await stream(engine, clock, args.rows, args.adapters, params)
        if loop_profile is not None:
            loop_profile.disable()
        ended = time.process_time()
        own = 1000 * statistics.median(clock.engine_s[WARM_STEPS:])
        # A mean: the loop may be steps behind, and catch up in others.
        whole = 1000 * (ended - clock.process_s[WARM_STEPS]) / (len(clock.process_s) - WARM_STEPS)
        print(f"| {args.rows} | {args.adapters} | {case} | {own:.2f} | {whole:.2f} |", flush=True)
        profile, clock.profile = clock.profile or loop_profile, None
        if profile is not None:
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def main() -> None:
    args = parse_args()
    print(machine.title())
    InstantBackend.vocab_size = args.vocab
    InstantBackend.samples_at_once = args.sampler == "device"
    InstantBackend.device_s = args.device_ms / 1000
    loraserve.engine.model_runner.open_backend = InstantBackend
    clock = StepClock()
    clock.install()
    with tempfile.TemporaryDirectory() as directory:
        adapters = write_adapters(Path(directory), args.adapters, 8)
        config = EngineConfig(
            model=str(default_model_path()),
            adapters=adapters,
            dtype="bfloat16",
            max_num_seqs=args.rows,
            speculate=args.speculate,
        )

        async def run() -> None:
            engine = AsyncEngine(config)
            gc.collect()
            gc.freeze()  # as servers do
            engine._engine._sampler = Sampler(engine._engine.runner.sample)
            await measure(engine, clock, args)
            await engine.shutdown(0.0)

        print("| rows | adapters | sampling | engine's thread, ms | whole process, ms |")
        print("|---:|---:|---|---:|---:|")
        asyncio.run(run())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64, help="requests at once")
    parser.add_argument("--adapters", type=int, default=64, help="distinct ones; 0 is the base model")
    parser.add_argument("--steps", type=int, default=100, help="tokens of each request")
    parser.add_argument("--vocab", type=int, default=259, help="logits of a row")
    parser.add_argument(
        "--sampler",
        choices=["device", "host"],
        default="device",
        help="who samples",
    )
    parser.add_argument("--speculate", choices=["off", "ngram"], default="off")
    parser.add_argument("--device-ms", type=float, default=0.0, help="that the device takes for a step")
    parser.add_argument("--profile", choices=["engine", "loop"], help="print where the time goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
