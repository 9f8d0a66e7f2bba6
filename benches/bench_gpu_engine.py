"""Times the whole engine on a GPU: a model with Llama-3-8B's shapes, its random weights made on the device.

    python benches/bench_gpu_engine.py [--rehearse]

Decode: milliseconds between the steps of a batch whose sequences all decode. Prefill: seconds to the first
token of one prompt. Loads: what adapters that come from disk do to streams that run. `--rehearse` runs it all
once with the shapes of a toy on the CUDA emulator of the tests; its times mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loraserve.engine.model_runner
import torch
from llama_8b import LLAMA_3_8B, loader_of, write_adapters
from loraserve.config import EngineConfig
from loraserve.engine.engine import Engine
from loraserve.engine.sequence import EngineOutputs
from loraserve.sampling_params import SamplingParams

RANK = 16
PROMPT_TOKENS = 128
TIMEOUT_S = 120.0
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, ignore_eos=True)


@dataclass(frozen=True)
class Plan:
    """What is run, and on what."""

    raw_config: dict[str, Any]
    memory: str
    rows: Sequence[int]
    mixes: Sequence[int]  # distinct adapters
    prompts: Sequence[int]
    decode_tokens: int
    num_loads: int


CARD = Plan(LLAMA_3_8B, "14GiB", (1, 8, 32, 64), (0, 1, 8, 64), (2048, 8000), 48, 8)
TOY = Plan(
    LLAMA_3_8B | {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
    },
    "8MiB", (1, 4), (0, 1, 4), (200,), 6, 2,
)  # fmt: skip


class Requests:
    """Sends requests to an engine and remembers when their tokens came."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self.events: list[tuple[float, list[int]]] = []  # time, request ids that got a token
        self._ended: set[int] = set()
        self._errors: list[Exception] = []

    def on_outputs(self, outputs: EngineOutputs) -> None:
        now = time.perf_counter()
        with self._condition:
            last = [end.request_id for end in outputs.ends if end.token_id is not None]
            self.events.append((now, [*outputs.request_ids, *last]))
            self._ended.update(end.request_id for end in outputs.ends)
            self._errors += [end.error for end in outputs.ends if end.error is not None]
            self._condition.notify_all()

    def wait(self, ids: Sequence[int]) -> None:
        with self._condition:
            if not self._condition.wait_for(lambda: self._ended.issuperset(ids), TIMEOUT_S):
                raise TimeoutError(f"{len(set(ids) - self._ended)} requests did not end in {TIMEOUT_S:g} s")
            if self._errors:
                raise self._errors[0]

    def times(self, request_id: int) -> list[float]:
        with self._condition:
            return [now for now, ids in self.events if request_id in ids]

    def steps_ms(self, num_rows: int) -> list[float]:
        """Milliseconds between steps that gave a token to each of `num_rows` sequences."""
        with self._condition:
            full = [(now, len(ids) == num_rows) for now, ids in self.events]
        pairs = itertools.pairwise(full)
        return [1e3 * (end - start) for (start, is_full), (end, is_next) in pairs if is_full and is_next]


class Bench:
    """One engine with its adapters."""

    def __init__(self, plan: Plan, directory: Path, backend: Any) -> None:
        self._plan = plan
        self._requests = Requests()
        self._random = random.Random(0)
        started = time.perf_counter()
        paths = write_adapters(directory, max(plan.mixes) + plan.num_loads, RANK, plan.raw_config)
        self._names = list(paths)
        wrote = time.perf_counter()
        loraserve.engine.model_runner.load_model = loader_of(plan.raw_config)
        config = EngineConfig(
            model="random weights",
            device="cuda",
            memory=plan.memory,
            max_num_seqs=max(plan.rows),
            prefix_caching=False,
        )
        self.engine = Engine(config, self._on_outputs, backend=backend)
        opened = time.perf_counter()
        for name, path in paths.items():
            self.engine.adapters.load(name, path)
        checked = time.perf_counter()
        say(
            f"Adapters written in {wrote - started:.1f} s; engine opened in {opened - wrote:.1f} s, "
            f"{len(paths)} adapters of rank {RANK} checked in {checked - opened:.1f} s.\n"
        )

    def _on_outputs(self, outputs: EngineOutputs) -> None:
        self._requests.on_outputs(outputs)

    def submit(self, num_tokens: int, adapter: str | None, params: SamplingParams) -> int:
        vocab = self._plan.raw_config["vocab_size"]
        prompt = [self._random.randrange(vocab) for _ in range(num_tokens)]
        return self.engine.submit(prompt, [(adapter, 1.0)] if adapter else [], params, seed=1)

    def run(
        self, num_rows: int, num_adapters: int, params: SamplingParams, num_tokens: int
    ) -> tuple[Requests, list[int]]:
        self._requests = Requests()
        params = SamplingParams(**{**vars_of(params), "max_tokens": num_tokens})
        prompt_tokens = min(PROMPT_TOKENS, self._plan.raw_config["max_position_embeddings"] // 4)
        ids = [
            self.submit(prompt_tokens, self._names[row % num_adapters] if num_adapters else None, params)
            for row in range(num_rows)
        ]
        self._requests.wait(ids)
        return self._requests, ids

    def decode(self) -> None:
        say("### Decode\n\n| rows | adapters | | ms a step | slowest | tokens/s |\n|---|---|---|---|---|---|")
        for num_rows in self._plan.rows:
            for num_adapters in (mix for mix in self._plan.mixes if mix <= num_rows):
                for label, params in (("greedy", GREEDY), ("sampled", SAMPLED)):
                    if label == "sampled" and num_adapters not in (0, max(self._plan.mixes)):
                        continue
                    self.run(num_rows, num_adapters, params, 4)  # loads adapters, captures the graph
                    requests, _ = self.run(num_rows, num_adapters, params, self._plan.decode_tokens)
                    steps = requests.steps_ms(num_rows)
                    if not steps:
                        say(f"| {num_rows} | {num_adapters} | {label} | no full step | | |")
                        continue
                    median = statistics.median(steps)
                    say(
                        f"| {num_rows} | {num_adapters} | {label} | {median:.2f} | {max(steps):.2f} "
                        f"| {1e3 * num_rows / median:,.0f} |"
                    )
        say("")

    def prefill(self) -> None:
        say("### Prefill\n\n| prompt | adapter | seconds to the first token | tokens/s |\n|---|---|---|---|")
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        for num_tokens in self._plan.prompts:
            for adapter in (None, self._names[0]):
                seconds = []
                for _ in range(3):
                    self._requests = Requests()
                    started = time.perf_counter()
                    request_id = self.submit(num_tokens, adapter, params)
                    self._requests.wait([request_id])
                    seconds.append(self._requests.times(request_id)[0] - started)
                best, which = min(seconds), "one" if adapter else "none"
                say(f"| {num_tokens} | {which} | {best:.3f} | {num_tokens / best:,.0f} |")
        say("")

    def loads(self) -> None:
        """Streams on the base model while adapters that are not in the pool are asked for."""
        self._requests = Requests()
        num_rows = min(8, self._plan.rows[-1] - self._plan.num_loads, 8) or 1
        long = SamplingParams(temperature=0.0, max_tokens=self._plan.decode_tokens * 4, ignore_eos=True)
        short = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        tokens = min(PROMPT_TOKENS, 64)
        streams = [self.submit(tokens, None, long) for _ in range(num_rows)]
        while not all(len(self._requests.times(stream)) > 8 for stream in streams):
            time.sleep(0.01)
        started = time.perf_counter()
        late = [self.submit(tokens, name, short) for name in self._names[-self._plan.num_loads :]]
        self._requests.wait([*streams, *late])
        first = sorted(self._requests.times(request_id)[0] - started for request_id in late)
        times = self._requests.times(streams[0])
        gaps = [1e3 * (end - start) for start, end in itertools.pairwise(times)]
        calm = statistics.median(gap for gap, start in zip(gaps, times, strict=False) if start < started)
        say(
            f"### Loads under decode\n\n{num_rows} streams, {len(late)} adapters from disk: first tokens of "
            f"the new ones after {first[0]:.3f} to {first[-1]:.3f} s; a stream's step {calm:.2f} ms before, "
            f"its longest gap {max(gaps):.2f} ms.\n"
        )

    def host_times(self) -> None:
        """Where the engine's thread spends a decode step."""
        num_rows, num_adapters = self._plan.rows[-1], self._plan.mixes[-1]
        spent: dict[str, float] = {}
        with (
            timed(self.engine.runner, "execute", spent),
            timed(self.engine.runner, "sample", spent),
            timed(self.engine, "_commit", spent),
            timed(self.engine, "_deliver", spent),
        ):
            requests, _ = self.run(num_rows, num_adapters, GREEDY, self._plan.decode_tokens)
        num_steps = len(requests.events)
        parts = ", ".join(f"{name} {1e3 * seconds / num_steps:.2f} ms" for name, seconds in spent.items())
        say(
            f"### The engine's thread\n\n{num_rows} rows, {num_adapters} adapters, mean of a step: "
            f"{parts} (_commit waits for the device).\n"
        )

    def profile(self) -> None:
        """Which kernels a decode step consists of."""
        if not torch.cuda.is_available():
            return
        from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415 (slow to import)

        for num_rows, num_adapters in ((self._plan.rows[-1], self._plan.mixes[-1]), (1, 1)):
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                self.run(num_rows, num_adapters, GREEDY, 12)
                torch.cuda.synchronize()
            table = profiler.key_averages().table(
                sort_by="self_cuda_time_total", row_limit=18, max_name_column_width=70
            )
            lines = [line for line in table.splitlines() if line.strip()]
            say(
                f"### Kernels of {num_rows} rows, {num_adapters} adapters: prefill and 11 decode steps\n\n```"
            )
            say("\n".join(_columns(line) for line in lines) + "\n```\n")


def say(text: str) -> None:
    """Printed at once: what was measured stays if a later part hangs."""
    print(text, flush=True)


def _columns(line: str) -> str:
    """The name, and the last five columns: device time, share, total, mean, calls."""
    return f"{line[:72]} {line[-75:]}" if len(line) > 150 else line


def vars_of(params: SamplingParams) -> dict[str, Any]:
    return {"temperature": params.temperature, "top_p": params.top_p, "ignore_eos": params.ignore_eos}


@contextmanager
def timed(owner: Any, name: str, spent: dict[str, float]) -> Iterator[None]:
    """Adds up the seconds spent in `owner.name`."""
    function: Callable[..., Any] = getattr(owner, name)
    spent[name] = 0.0

    def measured(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - started

    setattr(owner, name, measured)
    try:
        yield
    finally:
        setattr(owner, name, function)


def emulated_backend(plan: Plan) -> Any:
    """The CUDA backend over the emulator that the tests use."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.gpu.device import open_driver  # noqa: PLC0415 (not there in a wheel)
    from tests.gpu.emulated_backend import EmulatedBackend  # noqa: PLC0415

    driver, reason = open_driver()
    if driver is None or not driver.is_emulated:
        raise SystemExit(f"bench_gpu_engine: no emulator to rehearse on: {reason}")
    config = EngineConfig(model="random weights", memory=plan.memory, max_num_seqs=max(plan.rows))
    return EmulatedBackend(config, driver)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="toy shapes on the tests' emulator")
    arguments = parser.parse_args()
    plan = TOY if arguments.rehearse else CARD
    if not arguments.rehearse and not torch.cuda.is_available():
        print("bench_gpu_engine: torch finds no NVIDIA GPU here; nothing was measured", file=sys.stderr)
        return 1
    backend = emulated_backend(plan) if arguments.rehearse else None
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(plan, Path(directory), backend)
        failures = 0
        for part in (bench.decode, bench.prefill, bench.loads, bench.host_times, bench.profile):
            try:
                part()
            except Exception as error:
                failures += 1
                say(f"\n{part.__name__} failed: {type(error).__name__}: {error}\n")
        bench.engine.shutdown(0.0)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
