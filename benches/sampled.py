"""The offline workload sampled, in turns with greedy, on one engine: what choosing tokens costs a batch.

Every request has temperature 1, top-p 0.95, all three penalties and 5 logprobs.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import machine
from engines import BenchFiles
from loraserve import LLM, SamplingParams
from offline import OfflineSettings
from streams import greedy
from tqdm import tqdm

BAR = 0.95  # of greedy's rate


def sampled(new_tokens: int, seed: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=new_tokens,
        ignore_eos=True,
        temperature=1.0,
        top_p=0.95,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logprobs=5,
        seed=seed,
    )


def run(settings: OfflineSettings) -> list[dict[str, Any]]:
    """One result per number of distinct adapters."""
    files = BenchFiles(settings.venvs, settings.rank)
    return [compare(settings, files, distinct) for distinct in settings.distinct]


def compare(settings: OfflineSettings, files: BenchFiles, distinct: int) -> dict[str, Any]:
    """Alternating turns, after one of each to warm up; the ratio is the median of neighbours' ratios."""
    workload, precision = settings.workload, settings.precision
    prompts, adapters = workload.prompts(), workload.adapters(distinct)
    kinds = {
        "greedy": [greedy(workload.new_tokens)] * workload.num_requests,
        "sampled": [sampled(workload.new_tokens, seed) for seed in range(workload.num_requests)],
    }
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    busy = []
    engine = {"dtype": precision.dtype, "quantization": precision.quantization, "memory": "2GiB"}
    with LLM(str(files.model), files.adapters(distinct), prefix_caching=False, **engine) as llm:
        for repeat in tqdm(range(settings.repeats + 1), desc=f"{distinct} distinct", leave=False):
            for kind, params in kinds.items():
                busy.append(machine.busy_percent())
                start = time.perf_counter()
                outputs = llm.generate(prompts, params, adapters, progress=False)
                seconds = time.perf_counter() - start
                if any(len(output.token_ids) != workload.new_tokens for output in outputs):
                    raise RuntimeError(f"an answer has not {workload.new_tokens} tokens")
                if repeat > 0:
                    rates[kind].append(workload.num_requests * workload.new_tokens / seconds)
    pairs = zip(rates["sampled"], rates["greedy"], strict=True)
    return {
        "distinct": distinct,
        "precision": precision.name,
        "rates": rates,
        "medians": {kind: statistics.median(values) for kind, values in rates.items()},
        "over_greedy": statistics.median(one / other for one, other in pairs),
        "busy_percent": max(busy),
    }


def report(results: Sequence[dict[str, Any]]) -> str:
    lines = []
    for result in results:
        rates = ", ".join(f"{kind} {median:.1f}" for kind, median in result["medians"].items())
        ratio = result["over_greedy"]
        verdict = f"bar {BAR}: {'met' if ratio >= BAR else 'missed'}"
        lines.append(f"{result['distinct']} distinct: {rates} tok/s: {ratio:.3f} ({verdict})")
    return "\n".join(lines)
