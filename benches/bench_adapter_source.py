"""Thousands of adapters in a bucket of an S3 server on this machine, fetched when requests name them.

A tiny random model, so that what is measured is the way of an adapter, not the model's. Prints whether every
answer is that of the same adapter from a directory, how often each was fetched, and what a first token costs
over a plain fetch. With --outage the bucket fails for a while: what callers are told of adapters in memory,
on disk and elsewhere, and when the last are served again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
from loraserve import LLM, SamplingParams
from loraserve.adapters.remote import WANTED
from loraserve.client import Client
from loraserve.errors import LoraserveError, SourceUnavailableError
from loraserve.remote.disk_cache import DiskCache
from loraserve.remote.fetcher import Fetcher
from loraserve.remote.location import AllowedLocations, parse_remote
from machine import describe
from moto.server import ThreadedMotoServer
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.remote.failing_source import FailingSource

BUCKET = "adapters-bucket"
PROMPT = [11, 220, 3405, 17, 92, 1033, 7, 7, 501]
PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
BEFORE_S, AFTER_S = 5.0, 30.0
HIDDEN, LAYERS, HEADS, RANK = 64, 2, 4, 8


def main() -> None:
    """Prints the results, a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", type=int, default=10_000, help="adapters in the bucket")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--pool", type=int, default=100, help="about how many adapters fit in memory")
    parser.add_argument("--zipf", type=float, default=1.2, help="exponent of the names' popularity")
    parser.add_argument("--cold", type=int, default=40, help="adapters whose first token is timed alone")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument(
        "--outage", type=float, help="instead: seconds for which the bucket fails while clients ask"
    )
    parser.add_argument(
        "--fails", choices=("refuses", "hangs", "503"), default="refuses", help="what the bucket does then"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run = measure if options.outage is None else measure_outage
        results = run(Path(directory), options)
    for name, value in results.items():
        print(f"{name:<34} {value}")
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": describe(), **results}, indent=1))


def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All results, by what they are."""
    model = make_model(directory / "model")
    make = adapter_maker(directory / "template")
    server = bucket_server(make, options.names)
    nbytes = sum(map(len, make(0).values()))
    pool_nbytes = options.pool * nbytes + 8 * 2**20
    with serving(model, directory / "cache", pool_nbytes, directory / "log") as (http, grpc):
        first = [options.names - 1 - index for index in range(options.cold)]
        cold = [timed_first(grpc, f"a{index}") for index in first]
        plain = plain_fetches(
            directory / "plain", range(options.names - 1 - 2 * options.cold, options.names - 1 - options.cold)
        )
        rng = random.Random(0)
        weights = [1 / (rank + 1) ** options.zipf for rank in range(options.names)]
        asked = rng.choices(range(options.names), weights, k=options.requests)
        began = time.perf_counter()
        with ThreadPoolExecutor(options.clients) as clients:
            answers = list(
                tqdm(clients.map(lambda index: ask(grpc, f"a{index}"), asked), total=len(asked), leave=False)
            )
        took_s = time.perf_counter() - began
        downloads = metric(http, "loraserve_adapter_downloads_total")
    distinct = sorted(set(asked))
    right = from_directories(directory, str(model), distinct, make)
    wrong = sum(answer != right[index] for index, answer in zip(asked, answers, strict=True))
    server.stop()
    return {
        "requests": len(asked),
        "distinct adapters asked for": len(distinct),
        "wrong answers": wrong,
        "downloads beyond one each": int(downloads) - len({*asked, *first}),
        "requests a second": round(len(asked) / took_s, 1),
        "adapter bytes": nbytes,
        "cold first token, ms, median": round(1e3 * statistics.median(cold), 1),
        "plain fetch, ms, median": round(1e3 * statistics.median(plain), 1),
        "cold first token, ms, p99": round(1e3 * sorted(cold)[int(0.99 * len(cold))], 1),
    }


def measure_outage(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What clients are told of adapters in memory, on disk and elsewhere before, in and after an outage."""
    model = make_model(directory / "model")
    make = adapter_maker(directory / "template")
    server = bucket_server(make, options.names)
    source = FailingSource(server.get_host_and_port()[1])
    os.environ["AWS_ENDPOINT_URL"] = source.url
    third = options.names // 3
    names = {"in memory": range(20), "on disk": range(20, third), "elsewhere": range(third, options.names)}
    pool_nbytes = options.names * sum(map(len, make(0).values())) + 8 * 2**20
    with serving(model, directory / "cache", pool_nbytes, directory / "log") as (_, grpc):
        right = {index: ask(grpc, f"a{index}") for index in range(third)}
    right |= from_directories(directory, str(model), [*names["elsewhere"]], make)
    with serving(model, directory / "cache", pool_nbytes, directory / "log") as (_, grpc):
        for index in names["in memory"]:
            ask(grpc, f"a{index}")
        callers = OutageCallers(grpc, names, right)
        with ThreadPoolExecutor(options.clients) as clients:
            for seed in range(options.clients):
                clients.submit(callers.call, seed)
            time.sleep(BEFORE_S)
            began = time.perf_counter()
            source.behave(options.fails)
            time.sleep(options.outage)
            source.behave("answers")
            ended = time.perf_counter()
            time.sleep(AFTER_S)
            callers.has_ended = True
    source.close()
    server.stop()
    return callers.summary(began, ended)


@dataclass(frozen=True)
class Call:
    """One call: when it began and ended, and what came of it."""

    kind: str
    index: int
    began: float
    ended: float
    outcome: str
    retry_after_s: float | None = None


class OutageCallers:
    """Ask for adapters of all kinds in turns, and note what they are told."""

    def __init__(self, grpc: Client, names: dict[str, range], right: dict[int, list[int]]) -> None:
        self.has_ended = False
        self.calls: list[Call] = []
        self._grpc = grpc
        self._right = right
        self._indices = {kind: itertools.cycle(indices) for kind, indices in names.items()}

    def call(self, seed: int) -> None:
        """Asks until `has_ended`."""
        rng = random.Random(seed)
        while not self.has_ended:
            kind = rng.choice([*self._indices])
            index = next(self._indices[kind])
            began = time.perf_counter()
            outcome, retry_after_s = "right", None
            try:
                outcome = "right" if ask(self._grpc, f"a{index}") == self._right[index] else "WRONG"
            except SourceUnavailableError as error:
                outcome, retry_after_s = type(error).__name__, error.retry_after_s
            except LoraserveError as error:
                outcome = type(error).__name__
            self.calls.append(Call(kind, index, began, time.perf_counter(), outcome, retry_after_s))
            time.sleep(rng.uniform(0.1, 0.3))

    def summary(self, began: float, ended: float) -> dict[str, Any]:
        """By kind and time: how many of what, milliseconds, seconds to come back in."""
        results: dict[str, Any] = {}
        times = {"before": (0.0, began), "during": (began, ended), "after": (ended, float("inf"))}
        for (phase, (first, last)), kind in itertools.product(times.items(), self._indices):
            calls = [call for call in self.calls if call.kind == kind and first <= call.began < last]
            took = sorted(1e3 * (call.ended - call.began) for call in calls)
            told = [call.retry_after_s for call in calls if call.retry_after_s is not None]
            results[f"{phase}, {kind}"] = {
                **Counter(call.outcome for call in calls),
                "ms": [round(took[int(share * (len(took) - 1))], 1) for share in (0.5, 0.99, 1.0)],
                **({"retry after, s": [round(min(told), 1), round(max(told), 1)]} if told else {}),
            }
        fetched = [call for call in self.calls if call.kind == "elsewhere" and call.outcome == "right"]
        known = {call.index for call in fetched if call.ended <= ended}
        again = [call.ended for call in fetched if call.index not in known]
        results["first fetched again after, s"] = round(min(again) - ended, 2)
        failed = [call.ended for call in self.calls if call.began > ended and call.outcome != "right"]
        results["last refused after, s"] = round(max(failed, default=ended) - ended, 2)
        return results


def bucket_server(make: Any, num_names: int) -> ThreadedMotoServer:
    """S3 on this machine with that many adapters; the environment's credentials become those for it."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    for index in tqdm(range(num_names), desc="adapters", leave=False):
        for name, data in make(index).items():
            client.put_object(Bucket=BUCKET, Key=f"adapters/a{index}/{name}", Body=data)
    return server


def make_model(path: Path) -> Path:
    """A random Llama with the demo model's tokens."""
    from loraserve.loader.default import default_model_path  # noqa: PLC0415

    source = Path(default_model_path())
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def adapter_maker(path: Path) -> Any:
    """Files of adapter number n, by name: distinct, and enough to change answers."""
    import torch  # noqa: PLC0415
    from safetensors.torch import save  # noqa: PLC0415

    config = json.dumps(
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": RANK,
            "lora_alpha": RANK,
            "target_modules": ["q_proj", "o_proj"],
        }
    ).encode()

    def make(index: int) -> dict[str, bytes]:
        generator = torch.Generator().manual_seed(index)
        tensors = {
            f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{matrix}.weight": torch.randn(
                (RANK, HIDDEN) if matrix == "A" else (HIDDEN, RANK), generator=generator
            )
            for layer, module, matrix in itertools.product(range(LAYERS), ("q_proj", "o_proj"), "AB")
        }
        return {"adapter_config.json": config, "adapter_model.safetensors": save(tensors)}

    return make


@contextmanager
def serving(model: Path, cache: Path, pool_nbytes: int, log: Path) -> Iterator[tuple[httpx.Client, Client]]:
    """Clients of a server that fetches from the bucket."""
    command = [sys.executable, "-m", "loraserve", "serve", str(model), "--http-port", "0", "--grpc-port", "0"]
    command += [
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--memory",
        str(pool_nbytes),
        "--adapter-host-memory",
        "0",
    ]
    command += ["--adapter-source", f"s3://{BUCKET}/adapters/{{name}}", "--adapter-cache-dir", str(cache)]
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as server,
    ):
        assert server.stdout is not None
        words = server.stdout.readline().replace(",", " ").split()
        try:
            grpc, url = words[words.index("grpc") + 1], words[words.index("http") + 1]
            with httpx.Client(base_url=url, timeout=300.0) as http, Client(grpc, timeout=300.0) as client:
                yield http, client
        finally:
            server.terminate()


def ask(grpc: Client, name: str) -> list[int]:
    """The answer's tokens."""
    return grpc.generate(PROMPT, PARAMS, adapter=name)[0].token_ids


def timed_first(grpc: Client, name: str) -> float:
    """Seconds to the first token of an adapter that nobody has asked for."""
    began = time.perf_counter()
    next(iter(grpc.stream(PROMPT, PARAMS, adapter=name)))
    return time.perf_counter() - began


def plain_fetches(cache: Path, indices: range) -> list[float]:
    """Seconds of fetching alone, one after another."""
    fetcher = Fetcher(DiskCache(cache, 2**34), WANTED, AllowedLocations())
    times = []
    for index in indices:
        began = time.perf_counter()
        fetcher.fetch(parse_remote(f"s3://{BUCKET}/adapters/a{index}")).close()
        times.append(time.perf_counter() - began)
    return times[1:]  # the first connects


def metric(http: httpx.Client, name: str) -> float:
    """A value of /metrics."""
    lines = http.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def from_directories(directory: Path, model: str, indices: list[int], make: Any) -> dict[int, list[int]]:
    """The answers of the same adapters, loaded from directories one by one."""
    answers = {}
    with LLM(model, dtype="float32", device="cpu", memory="64MiB") as llm:
        for index in tqdm(indices, desc="compared", leave=False):
            path = directory / "compared" / f"a{index}"
            path.mkdir(parents=True)
            for name, data in make(index).items():
                (path / name).write_bytes(data)
            llm.load_adapter(path.name, path)
            (output,) = llm.generate([PROMPT], PARAMS, adapter=path.name)
            answers[index] = output.token_ids
            llm.unload_adapter(path.name)
    return answers


if __name__ == "__main__":
    main()
