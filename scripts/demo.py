"""The demo: one server with one model and four adapters answers a mixed batch, and calls tools."""

from __future__ import annotations

import argparse
import asyncio
import json
import selectors
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from loraserve.client import AsyncClient
from loraserve.errors import LoraserveError
from loraserve.sampling_params import SamplingParams

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
START_TIMEOUT_S = 180.0  # the model is on this disk, but the disk may be cold
STOP_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 300.0
DTYPE = "float32"  # bfloat16 rounds differently on different CPUs, and a near tie then shows another answer
QUANTIZATION = "none"  # rows of bytes round otherwise on another CPU, and an answer may hang on it
MAX_MESSAGES = 8  # of a conversation with tools
PARAMS = SamplingParams(max_tokens=64, temperature=0.0)


class DemoError(Exception):
    """The demo can't go on; the message says why."""


@dataclass(frozen=True)
class Prompt:
    """One user message and the adapter to answer it; None is the base model.

    `results` are what its tools give, by name.
    """

    text: str
    adapter: str | None
    tools: tuple[dict[str, Any], ...] = ()
    results: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What is shown, line by line, and the tokens that it took."""

    lines: list[str]
    num_tokens: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="smollm2", help="model the adapters were trained on (default %(default)s)"
    )
    args = parser.parse_args()
    try:
        run(args.model, read_prompts(EXAMPLES / "prompts.json"), find_adapters(EXAMPLES / "adapters"))
    except (DemoError, LoraserveError, TimeoutError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    return 0


def read_prompts(path: Path) -> list[Prompt]:
    if not path.exists():
        raise DemoError(f"{path} is missing")
    return [
        Prompt(entry["prompt"], entry["adapter"], tuple(entry.get("tools", ())), entry.get("results", {}))
        for entry in json.loads(path.read_text())
    ]


def find_adapters(folder: Path) -> dict[str, Path]:
    """The adapters below `folder` by name: their directories hold an adapter_config.json."""
    adapters = {config.parent.name: config.parent for config in sorted(folder.glob("*/adapter_config.json"))}
    if not adapters:
        raise DemoError(f"{folder} has no adapters")
    return adapters


def run(model: str, prompts: Sequence[Prompt], adapters: dict[str, Path]) -> None:
    print(f"starting a server: {model} with the adapters {', '.join(adapters)}", flush=True)
    with running_server(model, adapters) as address:
        print(f"sending {len(prompts)} prompts at once to {address}\n", flush=True)
        answers, seconds = asyncio.run(answer_all(address, prompts))
        print(table(prompts, answers))
        num_tokens = sum(answer.num_tokens for answer in answers)
        print(
            f"\n{len(prompts)} answers in one mixed batch: {num_tokens} tokens in {seconds:.1f} s, "
            f"{num_tokens / seconds:.0f} tokens/s"
        )
    print("server stopped cleanly")


@contextmanager
def running_server(model: str, adapters: dict[str, Path]) -> Iterator[str]:
    """A server process on a free port of this machine, stopped by SIGTERM; gives its address."""
    command = [
        sys.executable,
        "-m",
        "loraserve",
        "serve",
        model,
        "--grpc-port",
        "0",
        "--http-port",
        "off",
        "--log-level",
        "warning",
        "--dtype",
        DTYPE,
        "--quantization",
        QUANTIZATION,
    ]
    for name, path in adapters.items():
        command += ["--adapter", f"{name}={path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield ready_address(process)
        except BaseException:
            process.kill()
            raise
        stop(process)


def ready_address(process: subprocess.Popen[str]) -> str:
    """Waits for the server's ready line, "loraserve ready: grpc ADDRESS, …", and gives the address."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(START_TIMEOUT_S):
            raise DemoError(f"the server was not ready after {START_TIMEOUT_S:g} s")
    words = process.stdout.readline().replace(",", "").split()
    if "grpc" not in words:
        raise DemoError(f"the server ended with status {process.wait(STOP_TIMEOUT_S)}, see its message above")
    return words[words.index("grpc") + 1]


def stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        status = process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise DemoError(f"the server did not stop within {STOP_TIMEOUT_S:g} s of SIGTERM") from None
    if status != 0:
        raise DemoError(f"the server ended with status {status}, expected 0")


async def answer_all(address: str, prompts: Sequence[Prompt]) -> tuple[list[Answer], float]:
    """The answers in order, and the seconds from the first request to the last token."""
    async with AsyncClient(address, timeout=ANSWER_TIMEOUT_S) as client:
        await client.wait_ready(START_TIMEOUT_S)
        started = time.perf_counter()
        answers = await asyncio.gather(*(answer(client, prompt) for prompt in prompts))
        return answers, time.perf_counter() - started


async def answer(client: AsyncClient, prompt: Prompt) -> Answer:
    """The answer; where it calls tools, its calls, what they give, and what it says then."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": prompt.text}]
    lines, num_tokens = [], 0
    while True:
        (given,) = await client.generate(
            messages=messages, params=PARAMS, adapter=prompt.adapter, tools=prompt.tools or None
        )
        num_tokens += len(given.token_ids)
        lines += [line for line in given.text.strip().splitlines() if line]
        if not given.tool_calls or len(messages) > MAX_MESSAGES:
            return Answer(lines, num_tokens)
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in given.tool_calls
        ]
        messages.append({"role": "assistant", "content": given.text, "tool_calls": calls})
        for call in given.tool_calls:
            result = json.dumps(prompt.results.get(call.name, {"error": "there is no such tool"}))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
            lines += [f"calls {call.name} {call.arguments}", f"which gives {result}"]


def table(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> str:
    """Three aligned columns, wrapped to the terminal: adapter, prompt, answer."""
    columns = min(shutil.get_terminal_size((110, 24)).columns, 160)
    first = max(len("adapter"), *(len(prompt.adapter or "(base)") for prompt in prompts))
    width = max((columns - first - 6) // 2, 20)
    rule = f"{'-' * first}-+-{'-' * width}-+-{'-' * width}"
    lines = [f"{'adapter':<{first}} | {'prompt':<{width}} | answer", rule]
    for prompt, given in zip(prompts, answers, strict=True):
        cells = [
            [prompt.adapter or "(base)"],
            textwrap.wrap(prompt.text, width),
            [part for line in given.lines for part in textwrap.wrap(line, width)],
        ]
        for name, left, right in zip_longest(*cells, fillvalue=""):
            lines.append(f"{name:<{first}} | {left:<{width}} | {right}")
        lines.append(rule)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
