"""A thousand registered adapters on a pool that holds a part of them: a Zipf stream, checked and timed.

Every adapter's answer in the stream is compared with its answer when it ran alone in a fresh engine
(for a sample of adapters), the pool's page counts with its budget, and the process's memory is printed.

    python benches/bench_many_adapters.py --adapters 1000 --rank 8 --requests 2000 --memory 2GiB
"""

import argparse
import random
import resource
import tempfile
import time
from pathlib import Path

from loraserve import LLM, SamplingParams
from tqdm import tqdm
from workloads import Workload, write_adapters


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        print(f"writing {args.adapters} adapters of rank {args.rank}")
        adapters = write_adapters(Path(directory), args.adapters, args.rank)
        run(args, adapters)


def run(args: argparse.Namespace, adapters: dict[str, str]) -> None:
    generator = random.Random(args.seed)
    names = list(adapters)
    weights = [1 / (rank + 1) ** args.alpha for rank in range(len(names))]
    stream = generator.choices(names, weights, k=args.requests)
    prompt = Workload(num_requests=1, prompt_tokens=32).prompts()[0]
    params = SamplingParams(max_tokens=args.new_tokens, temperature=0.0, ignore_eos=True)

    with LLM("smollm2", memory=args.memory) as llm:
        start = time.perf_counter()
        for name, path in tqdm(adapters.items(), desc="register"):
            llm.load_adapter(name, path)
        print(f"registered {len(adapters)} adapters in {time.perf_counter() - start:.1f} s")
        start = time.perf_counter()
        outputs = llm.generate([prompt] * len(stream), params, stream)
        elapsed = time.perf_counter() - start
        info = llm.info()
    rate = len(stream) * args.new_tokens / elapsed
    print(f"{len(stream)} requests, {len(set(stream))} adapters: {elapsed:.1f} s, {rate:.1f} tok/s")
    print(f"{info.num_adapter_loads} loads, {info.num_adapter_evictions} evictions")
    pages = f"{info.num_adapter_pages} of {info.num_pages} pages"
    print(f"{info.num_resident_adapters} adapters resident in {pages} at the end")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak resident memory of the process: {peak:.2f} GiB")

    answers = {name: output.token_ids for name, output in zip(stream, outputs, strict=True)}
    assert all(answers[n] == o.token_ids for n, o in zip(stream, outputs, strict=True)), "answers vary"
    sample = generator.sample(sorted(answers), min(args.check, len(answers)))
    with LLM("smollm2", {name: adapters[name] for name in sample}, memory=args.memory) as llm:
        alone = {name: llm.generate([prompt], params, name)[0].token_ids for name in sample}
    assert alone == {name: answers[name] for name in sample}, "an answer differs from the adapter's own"
    print(f"{len(sample)} adapters checked against running alone: equal")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--alpha", type=float, default=1.2, help="Zipf exponent")
    parser.add_argument("--check", type=int, default=50, help="adapters to compare with running alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--directory", help="where to write the adapters; default: the system's temporary folder"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
