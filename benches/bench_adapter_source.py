"""Thousands of adapters in a bucket of an S3 server on this machine, fetched when requests name them.

A tiny random model, so that what is measured is the way of an adapter, not the model's. Prints whether every
answer is that of the same adapter from a directory, how often each was fetched, and what a first token costs
over a plain fetch.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import httpx
from loraserve import LLM, SamplingParams
from loraserve.adapters.remote import WANTED
from loraserve.client import Client
from loraserve.remote.disk_cache import DiskCache
from loraserve.remote.fetcher import Fetcher
from loraserve.remote.location import AllowedLocations, parse_remote
from machine import describe
from moto.server import ThreadedMotoServer
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

BUCKET = "adapters-bucket"
PROMPT = [11, 220, 3405, 17, 92, 1033, 7, 7, 501]
PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        results = measure(Path(directory), options)
    for name, value in results.items():
        print(f"{name:<34} {value}")
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": describe(), **results}, indent=1))


def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All results, by what they are."""
    model = make_model(directory / "model")
    make = adapter_maker(directory / "template")
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    for index in tqdm(range(options.names), desc="adapters", leave=False):
        for name, data in make(index).items():
            client.put_object(Bucket=BUCKET, Key=f"adapters/a{index}/{name}", Body=data)
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
