"""A thousand registered adapters beside ten: Zipf streams over pools that hold all of them, or some.

On each pool, streams over all adapters and over the ten most popular alternate on one engine; a first pass
of both, which brings the adapters in, is not timed. Answers are checked: the same adapter gives the same
tokens throughout, and a sample of adapters gives what each gives alone in a fresh engine.

Then the stream over all adapters alternates between a pool of all that it asks for, adapters and a full
batch's KV cache, and two pools of half of that: with a host tier, which evicted adapters return from, and
without one.

    python benches/bench_many_adapters.py
    python benches/bench_many_adapters.py --memory 1GiB 2GiB 4GiB 7GiB --json many.json --plot many.png
"""

import argparse
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import machine
import numpy as np
import plots
from loraserve import LLM, SamplingParams
from loraserve.config import EngineConfig, parse_memory
from tqdm import tqdm
from workloads import Workload, write_adapters, zipf_shares

NUM_FEW = 10
PROMPT_TOKENS = 32
BLOCK_SIZE = 16  # tokens of a page


class Stream:
    """One prompt to adapters drawn by Zipf's law; every pass asks the same adapters in the same order."""

    def __init__(self, names: Sequence[str], args: argparse.Namespace) -> None:
        random_state = np.random.RandomState(args.seed)
        shares = zipf_shares(len(names), args.alpha)
        self.names = [names[i] for i in random_state.choice(len(names), args.requests, p=shares)]
        self.prompt = Workload(num_requests=1, prompt_tokens=PROMPT_TOKENS).prompts()[0]
        self.params = SamplingParams(max_tokens=args.new_tokens, temperature=0.0, ignore_eos=True)
        self.answers: dict[str, list[int]] = {}

    def run(self, llm: LLM) -> float:
        """Output tokens per second. Raises RuntimeError if an adapter's answer is not what it was."""
        start = time.perf_counter()
        outputs = llm.generate([self.prompt] * len(self.names), self.params, self.names, progress=False)
        elapsed = time.perf_counter() - start
        for name, output in zip(self.names, outputs, strict=True):
            if self.answers.setdefault(name, output.token_ids) != output.token_ids:
                raise RuntimeError(f"two answers of {name} differ")
        return len(self.names) * self.params.max_tokens / elapsed


def main() -> None:
    args = parse_args()
    print(machine.title())
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        print(f"writing {args.adapters} adapters of rank {args.rank}")
        adapters = write_adapters(Path(directory), args.adapters, args.rank)
        stream = Stream(list(adapters), args)
        results = [measure(memory, stream, adapters, args) for memory in args.memory]
        turnover = measure_turnover(stream, adapters, args)
        check_alone(stream, adapters, args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak resident memory of the process: {peak:.2f} GiB")
    if args.json:
        document = {"machine": machine.describe(), "settings": vars(args), "results": results}
        document["turnover"] = turnover
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=2, default=str) + "\n")
    if args.plot and results:
        points = [(result["memory_gib"], result["ratio"]) for result in results]
        labels = ("pool [GiB]", f"throughput over that of {NUM_FEW} adapters")
        plots.plot_curve(points, labels, f"{args.adapters} adapters; {machine.title()}", args.plot)


def measure(
    memory: str, many: Stream, adapters: Mapping[str, str], args: argparse.Namespace
) -> dict[str, Any]:
    """Both streams on a pool of this size."""
    few = Stream(list(adapters)[:NUM_FEW], args)
    with LLM("smollm2", memory=memory, prefix_caching=False) as llm:
        for name, path in tqdm(adapters.items(), desc="register", leave=False):
            llm.load_adapter(name, path)
        rates: dict[str, list[float]] = {"few": [], "many": []}
        few.run(llm)
        many.run(llm)
        before = llm.info()
        for _ in tqdm(range(args.repeats), desc=memory, leave=False):
            rates["few"].append(few.run(llm))
            rates["many"].append(many.run(llm))
        info = llm.info()
    medians = {key: statistics.median(values) for key, values in rates.items()}
    result = {
        "memory": memory,
        "memory_gib": parse_memory(memory) / 2**30,
        "num_asked_for": len(set(many.names)),
        "num_resident": info.num_resident_adapters,
        "loads_per_pass": (info.num_adapter_loads - before.num_adapter_loads) / args.repeats,
        "rates": rates,
        "medians": medians,
        "ratio": medians["many"] / medians["few"],
    }
    print(
        f"{memory:>8}: {result['num_resident']} resident, {result['loads_per_pass']:.0f} loads a pass of "
        f"{args.requests} requests on {result['num_asked_for']} adapters: {medians['many']:.1f} tok/s, "
        f"{NUM_FEW} adapters {medians['few']:.1f} tok/s, ratio {result['ratio']:.2f}"
    )
    return result


def measure_turnover(stream: Stream, adapters: Mapping[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """The stream on each pool in turn, and its throughput over that of the pool that holds all."""
    needed = needed_nbytes(stream, adapters)
    cases = {
        "all resident": (needed, 0),
        "half, host tier": (needed // 2, needed),
        "half, no tier": (needed // 2, 0),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    llms, before = {}, {}
    with ExitStack() as stack:
        for name, (memory, tier) in cases.items():
            settings = {"memory": memory, "adapter_host_memory": tier, "prefix_caching": False}
            llm = llms[name] = stack.enter_context(LLM("smollm2", **settings))
            for adapter, path in adapters.items():
                llm.load_adapter(adapter, path)
            stream.run(llm)
            before[name] = llm.stats()
        for _ in tqdm(range(args.repeats), desc="turnover", leave=False):
            for name, llm in llms.items():
                rates[name].append(stream.run(llm))
        after = {name: llm.stats() for name, llm in llms.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    result = {}
    for name, median in medians.items():
        then, now = before[name], after[name]
        result[name] = {
            "memory": cases[name][0],
            "num_resident": now.num_resident_adapters,
            "loads_per_pass": (now.num_adapter_loads - then.num_adapter_loads) / args.repeats,
            "hits_per_pass": (now.host_tier.num_hits - then.host_tier.num_hits) / args.repeats,
            "host_tier_nbytes": now.host_tier.nbytes,
            "rates": rates[name],
            "median": median,
            "ratio": median / medians["all resident"],
        }
        print(
            f"{name:>15}: pool {cases[name][0] / 2**20:.0f} MiB, {now.num_resident_adapters} resident, "
            f"{result[name]['loads_per_pass']:.0f} loads a pass, {result[name]['hits_per_pass']:.0f} of them "
            f"from the host tier: {median:.1f} tok/s, ratio {result[name]['ratio']:.2f}"
        )
    return result


def needed_nbytes(stream: Stream, adapters: Mapping[str, str]) -> int:
    """Bytes of the adapters that the stream asks for, all of one size, and of a full batch's KV cache."""
    name = stream.names[0]
    with LLM("smollm2", {name: adapters[name]}, memory="64MiB") as llm:
        page_nbytes, config = llm.info().page_nbytes, EngineConfig(model="smollm2")
        adapter_pages = -(-llm.adapters()[0].nbytes // page_nbytes)
    num_seqs = min(config.max_num_seqs, len(stream.names))
    kv_pages = num_seqs * -(-(PROMPT_TOKENS + stream.params.max_tokens) // BLOCK_SIZE)
    return (len(set(stream.names)) * adapter_pages + kv_pages) * page_nbytes


def check_alone(stream: Stream, adapters: Mapping[str, str], args: argparse.Namespace) -> None:
    sample = random.Random(args.seed).sample(sorted(stream.answers), min(args.check, len(stream.answers)))
    with LLM("smollm2", {name: adapters[name] for name in sample}, memory="512MiB") as llm:
        for name in sample:
            answer = llm.generate([stream.prompt], stream.params, name)[0].token_ids
            if answer != stream.answers[name]:
                sys.exit(f"error: {name} answers otherwise alone than in the stream")
    print(f"{len(sample)} adapters checked against running alone: equal")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=1000, help="registered; default 1000")
    parser.add_argument("--rank", type=int, default=8, help="default 8: 4.9 MB each")
    parser.add_argument("--requests", type=int, default=500, help="of a pass; default 500")
    parser.add_argument("--new-tokens", type=int, default=16, help="of each answer; default 16")
    parser.add_argument(
        "--memory",
        nargs="*",
        default=["512MiB", "1GiB", "2GiB", "6GiB"],
        help="pools, none skips these; 1000 adapters of rank 8 and their KV cache fit in 6GiB; default "
        "512MiB 1GiB 2GiB 6GiB",
    )
    parser.add_argument("--alpha", type=float, default=1.2, help="Zipf's exponent; default 1.2")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes; default 3")
    parser.add_argument("--check", type=int, default=50, help="adapters to compare with running alone")
    parser.add_argument("--seed", type=int, default=0, help="of the stream; default 0")
    parser.add_argument("--directory", help="where to write the adapters; default: the temporary folder")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="also draw the curve as a PNG (loraserve[bench])")
    return parser.parse_args()


if __name__ == "__main__":
    main()
