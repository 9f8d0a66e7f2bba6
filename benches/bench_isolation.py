"""How far one caller's attack moves others' streams: the largest gap between tokens, beside a calm time's.

A server in a process of its own streams four answers of the base model to a client in another. Each attack
goes on for some seconds; before it the same time passes without one. With `--exits` the server is stopped in
the middle of each attack instead, and the time until its process has ended is shown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import httpx
import machine
from adapter_files import write_adapters
from tqdm import tqdm

NUM_STREAMS = 4
STREAM_TOKENS = 400  # a longer context would make gaps of its own
TIMEOUT_S = 30.0
DRAIN_S = 1.0
Attack: TypeAlias = "Callable[[Target], Awaitable[None]]"


class Target:
    """The server, and where it finds files."""

    def __init__(self, url: str, grpc_address: str, folder: Path) -> None:
        self.url, self.grpc_address, self.folder = url, grpc_address, folder

    async def post(self, path: str, body: Any) -> None:
        """What comes back, or whether anything does, is of no interest."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT_S) as client:
            with suppress(httpx.HTTPError):
                await client.post(path, content=data, headers={"content-type": "application/json"})

    async def connect(self, data: bytes) -> asyncio.StreamWriter:
        """A connection on which these bytes were sent."""
        host, port = self.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        return writer


def completions(body: bytes, count: int = 2, path: str = "/v1/completions") -> Attack:
    """The same body from some callers at once."""

    async def attack(target: Target) -> None:
        await asyncio.gather(*(target.post(path, body) for _ in range(count)))

    return attack


async def silent_hub(target: Target) -> None:
    """Twelve loads from a Hub that takes connections and never answers."""
    names = [f"n{random.getrandbits(32)}" for _ in range(12)]
    await asyncio.gather(
        *(target.post("/adapters", {"name": name, "source": f"hf://owner/{name}"}) for name in names)
    )


async def broken_adapters(target: Target) -> None:
    """Loads of a directory with a pipe for a file, and of 3,000 patterns."""
    for name in ("pipe", "patterns"):
        await target.post("/adapters", {"name": name, "source": str(target.folder / name)})


async def hostile_template(target: Target) -> None:
    """Six chats of an adapter whose template does not end."""
    chat = {"model": "hostile", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    await asyncio.gather(*(target.post("/v1/chat/completions", chat) for _ in range(6)))


async def large_template(target: Target) -> None:
    """Two chats of an adapter whose template makes a text of gigabytes in one call."""
    chat = {"model": "large", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    await asyncio.gather(*(target.post("/v1/chat/completions", chat) for _ in range(2)))


async def never_reads(target: Target) -> None:
    """32 callers that ask for a stream and take nothing of it."""
    body = json.dumps({"model": "smollm2", "prompt": "a", "max_tokens": 1, "stream": True}).encode()
    await _idle_connections(target, 32, body)


async def sends_slowly(target: Target) -> None:
    """200 callers that send a half of a body and nothing more."""
    await _idle_connections(target, 200, b'{"model": "smollm2", "prompt": "', declared=1000)


async def _idle_connections(target: Target, count: int, body: bytes, declared: int | None = None) -> None:
    length = len(body) if declared is None else declared
    headers = f"host: x\r\ncontent-type: application/json\r\ncontent-length: {length}"
    data = f"POST /v1/completions HTTP/1.1\r\n{headers}\r\n\r\n".encode() + body
    writers = [await target.connect(data) for _ in range(count)]
    await asyncio.sleep(1.0)
    for writer in writers:
        writer.transport.abort()


async def large_message(target: Target) -> None:
    """gRPC: two messages of 15 MB, of empty turns."""
    turns = b"\x0a\x00" * 7_500_000
    length, varint = len(turns), b""
    while length > 127:
        varint += bytes([length & 127 | 128])
        length >>= 7
    data = b"\x1a" + varint + bytes([length]) + turns
    method = "/loraserve.v1.LoraServe/Generate"

    async def send() -> None:
        async with grpc.aio.insecure_channel(target.grpc_address) as channel:
            with suppress(grpc.aio.AioRpcError):
                async for _ in channel.unary_stream(method)(data, timeout=TIMEOUT_S):
                    pass

    await asyncio.gather(send(), send())


def _completion(**fields: Any) -> bytes:
    return json.dumps({"model": "smollm2", "prompt": "a", "max_tokens": 1, **fields}).encode()


def _grammars(target: Target) -> list[bytes]:
    alternatives = "|".join(f"a{random.getrandbits(32)}b*" for _ in range(4000))
    properties = {f"p{i}": {"type": "string", "pattern": "^[a-z]{1,200}$"} for i in range(800)}
    return [
        _completion(guided_regex=alternatives),
        _completion(guided_json={"type": "object", "properties": properties, "title": str(random.random())}),
    ]


async def grammars(target: Target) -> None:
    """A regular expression of 4,000 alternatives and a schema of 800 patterns, never seen before."""
    await asyncio.gather(*(target.post("/v1/completions", body) for body in _grammars(target)))


EMPTY_TURN = b'{"role": "user", "content": ""},'
ATTACKS: dict[str, Attack] = {
    "12 loads from a Hub that never answers": silent_hub,
    "loads of a pipe, and of 3,000 rank patterns": broken_adapters,
    "6 chats of a template that does not end": hostile_template,
    "2 chats of a template that makes 4 GB": large_template,
    "2 bodies of 12 MB, of empty messages": completions(
        b'{"model": "smollm2", "messages": [' + EMPTY_TURN * 390_000 + b'{"role": "user"}]}',
        path="/v1/chat/completions",
    ),
    "2 bodies of 200,000 messages": completions(
        b'{"model": "smollm2", "messages": [' + EMPTY_TURN * 200_000 + b'{"role": "user"}]}',
        path="/v1/chat/completions",
    ),
    "2 bodies of 4,000,000 token ids": completions(
        b'{"model": "smollm2", "prompt": [' + b"1," * 4_000_000 + b"1]}"
    ),
    "2 bodies of 1,000,000 token ids": completions(
        b'{"model": "smollm2", "prompt": [' + b"1," * 1_000_000 + b"1]}"
    ),
    "2 prompts of 600,000 digits": completions(_completion(prompt="1" * 600_000)),
    "2 prompts of 600,000 digits, truncated to 10 tokens": completions(
        _completion(prompt="1" * 600_000, truncate_prompt_tokens=10)
    ),
    "2 texts of 32,000 digits to /tokenize": completions(
        json.dumps({"inputs": "1" * 32_000}).encode(), path="/tokenize"
    ),
    "2 gRPC messages of 15 MB, of empty turns": large_message,
    "a regex of 4,000 alternatives and a schema of 800 patterns": grammars,
    "32 readers that never read": never_reads,
    "200 senders that stop in the middle": sends_slowly,
}


class Reader:
    """The client of the streams, in a process of its own: tells the largest gap since it was last asked."""

    def __init__(self, url: str) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, __file__, "--reader", url]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def largest_gap_s(self) -> float:
        """Since the last call, of all streams."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


async def read_streams(url: str) -> None:
    """The reader's process: streams without end, and a line out for each line in."""
    gaps = [0.0]

    async def stream(client: httpx.AsyncClient) -> None:
        body = {"model": "smollm2", "prompt": "Once", "max_tokens": STREAM_TOKENS, "ignore_eos": True}
        while True:
            async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
                last = None
                async for _ in response.aiter_raw():
                    now = time.perf_counter()
                    if last is not None:
                        gaps.append(now - last)
                    last = now

    def tell() -> None:
        if not sys.stdin.readline():
            os._exit(0)
        print(max(gaps), flush=True)
        gaps[:] = [0.0]

    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), tell)
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        await asyncio.gather(*(stream(client) for _ in range(NUM_STREAMS)))


def prepare(folder: Path) -> dict[str, Path]:
    """Writes the adapters that attack; name → directory of those that the server starts with."""
    if (folder / "plain").exists():
        return {name: folder / name for name in ("hostile", "large")}
    plain = Path(next(iter(write_adapters(folder / "plain", 1, 8).values())))
    hostile = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    manifests = {
        "hostile": {"chat_template": hostile},
        "large": {"chat_template": "{{ 'a'.center(4 * 10 ** 9) }}"},
    }
    for name in (*manifests, "pipe", "patterns"):
        (folder / name).mkdir()
        for file in plain.iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    for name, manifest in manifests.items():
        (folder / name / "loraserve.json").write_text(json.dumps(manifest))
    os.mkfifo(folder / "pipe" / "loraserve.json")
    config = json.loads((plain / "adapter_config.json").read_text())
    config["rank_pattern"] = {f"(.*a{i}){{1,20}}.*b{{1,9}}": 8 for i in range(3000)}
    (folder / "patterns" / "adapter_config.json").write_text(json.dumps(config))
    return {name: folder / name for name in manifests}


def start_server(folder: Path, hub: str) -> tuple[subprocess.Popen[str], Target]:
    """A ready server on free ports; `folder` is empty, or has been one's before."""
    adapters = [part for name, path in prepare(folder).items() for part in ("--adapter", f"{name}={path}")]
    options = ("--adapter-root", str(folder), "--http-port", "0", "--grpc-port", "0", "--log-level", "error")
    options += ("--drain-seconds", str(DRAIN_S))
    command = [sys.executable, "-m", "loraserve", "serve", "smollm2", *adapters, *options]
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert server.stdout is not None
    words = server.stdout.readline().replace(",", "").split()
    return server, Target(words[5], words[3], folder)


async def measure(
    target: Target, reader: Reader, attacks: Sequence[str], seconds: float
) -> list[dict[str, Any]]:
    """One row an attack: milliseconds of the largest gap in a calm time, and under it."""
    rows = []
    while reader.largest_gap_s() == 0.0:
        await asyncio.sleep(0.5)
    for name in tqdm(attacks, unit="attack"):
        reader.largest_gap_s()
        await asyncio.sleep(seconds)
        calm_s = reader.largest_gap_s()
        until, times = time.monotonic() + seconds, 0
        pending: set[asyncio.Task[None]] = set()
        while time.monotonic() < until:
            times += 1
            pending.add(asyncio.create_task(ATTACKS[name](target)))  # type: ignore[arg-type]
            await asyncio.wait(pending, timeout=min(2.0, seconds))
            pending = {task for task in pending if not task.done()}
        attacked_s = reader.largest_gap_s()
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        rows.append(
            {"attack": name, "times": times, "calm_ms": calm_s * 1e3, "attacked_ms": attacked_s * 1e3}
        )
        await asyncio.sleep(1.0)
    return rows


async def stop_in(folder: Path, hub: str, name: str, seconds: float) -> dict[str, Any]:
    """One row: seconds from SIGTERM in the middle of an attack to the end of the process, and its status."""
    server, target = start_server(folder, hub)
    reader = Reader(target.url)
    try:
        while reader.largest_gap_s() == 0.0:
            await asyncio.sleep(0.5)
        attacking = asyncio.create_task(ATTACKS[name](target))  # type: ignore[arg-type]
        await asyncio.sleep(seconds)
        started = time.perf_counter()
        server.terminate()
        status = await asyncio.to_thread(server.wait, TIMEOUT_S)
        ended_s = time.perf_counter() - started
        attacking.cancel()
        await asyncio.gather(attacking, return_exceptions=True)
    finally:
        reader.close()
        server.kill()
        server.wait()
    return {"attack": name, "ended_s": ended_s, "status": status}


def report_exits(rows: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown."""
    lines = [f"| SIGTERM, drain {DRAIN_S:g} s, four streams and | ended after, s | status |", "|---|---|---|"]
    lines += [f"| {row['attack']} | {row['ended_s']:.1f} | {row['status']} |" for row in rows]
    return "\n".join(lines)


def report(rows: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown."""
    lines = ["| attack, again and again | largest gap without, ms | with, ms | more |", "|---|---|---|---|"]
    for row in rows:
        calm, attacked = row["calm_ms"], row["attacked_ms"]
        lines.append(f"| {row['attack']} | {calm:.0f} | {attacked:.0f} | {attacked - calm:+.0f} |")
    return "\n".join(lines)


def main() -> None:
    """The bench, or with `--reader` the client of its streams."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="that each attack, and each calm, lasts")
    parser.add_argument("--only", nargs="*", default=[], help="attacks whose name has one of these words")
    parser.add_argument("--exits", action="store_true", help="stop the server in the middle of each attack")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reader:
        asyncio.run(read_streams(args.reader))
        return
    attacks = [name for name in ATTACKS if not args.only or any(word in name for word in args.only)]
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as hub:
        folder, endpoint = Path(name), f"http://127.0.0.1:{hub.getsockname()[1]}"
        if args.exits:
            rows = [asyncio.run(stop_in(folder, endpoint, attack, 1.0)) for attack in tqdm(attacks)]
        else:
            rows = run_attacks(folder, endpoint, attacks, args.seconds)
    print(report_exits(rows) if args.exits else report(rows))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1))


def run_attacks(folder: Path, hub: str, attacks: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """`measure` on a server of its own."""
    server, target = start_server(folder, hub)
    reader = Reader(target.url)
    try:
        return asyncio.run(measure(target, reader, attacks, seconds))
    finally:
        reader.close()
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
