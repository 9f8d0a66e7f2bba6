"""Host time of sampling a step's rows, beside greedy: `python benches/bench_sampling.py`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import machine
import torch
from loraserve import SamplingParams, _core
from loraserve.models.ops import ReadyRows
from loraserve.sampling.sampler import Sampler

VOCAB_SIZES = 259, 49_152, 128_256
BATCH_SIZES = 64, 256
PROMPT = list(range(100))
ANSWER = list(range(50, 120))
SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "top-p 0.95": {"top_p": 0.95},
    "top-k 20, top-p 0.8": {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    "penalties, 5 logprobs": {
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
        "top_p": 0.95,
        "logprobs": 5,
    },
}


def random_logits(num_rows: int, vocab_size: int, spread: float) -> torch.Tensor:
    """Normal ones; of a trained model they spread by 3 or 4, of random weights by 1 or less."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, vocab_size, generator=generator) * spread


def make_step(
    host: _core.HostSampler, logits: torch.Tensor, settings: dict[str, float]
) -> Callable[[], object]:
    """Samples all rows of sequences that have had an answer, and takes the tokens."""
    num_rows, vocab_size = logits.shape

    def choose(logits: torch.Tensor, arrays: _core.SampleArrays) -> ReadyRows:
        return ReadyRows(host.sample(logits.data_ptr(), num_rows, vocab_size, arrays))

    sampler = Sampler(choose)
    request_ids = list(range(num_rows))
    for request_id in request_ids:
        params = SamplingParams(max_tokens=10**6, **settings)  # type: ignore[arg-type]
        sampler.add(request_id, params, request_id, PROMPT, [0])
        sampler.append([request_id] * len(ANSWER), ANSWER)

    def step() -> None:
        sampled = sampler.sample(logits, request_ids).result()
        sampler.append(request_ids, sampled.token_ids.tolist())

    return step


def median_ms(step: Callable[[], object], seconds: float) -> float:
    """Of as many steps as take these seconds, 5 at least."""
    times, until = list[float](), time.perf_counter() + seconds
    step()
    while len(times) < 5 or time.perf_counter() < until:
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--spread", type=float, default=4.0, help="of the logits")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each number")
    args = parser.parse_args()
    print(machine.title())
    host = _core.HostSampler(args.threads)
    for vocab_size in VOCAB_SIZES:
        for num_rows in BATCH_SIZES:
            logits = random_logits(num_rows, vocab_size, args.spread)
            for name, settings in SETTINGS.items():
                ms = median_ms(make_step(host, logits, settings), args.seconds)
                print(f"vocabulary {vocab_size:6}, {num_rows:3} rows, {name:21} {ms:8.3f} ms", flush=True)


if __name__ == "__main__":
    main()
