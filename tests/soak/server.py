"""The process under attack: started, stopped, killed, looked at."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

READY_S = 120.0
IDLE_S = 60.0
DRAIN_S = 1.0
READY = re.compile(r"loraserve ready: grpc \S+:(\d+), http \S+:(\d+),")
POOL = "3MiB"  # some adapters and some contexts: there is always something to evict


@dataclass(frozen=True)
class Idle:
    """What an idle server holds: pages by owner, open files, threads, bytes of memory."""

    pages: Mapping[str, int]
    num_files: int
    num_threads: int
    rss_nbytes: int


class Server:
    """One process at a time on the same ports and directories, so that callers find the next one."""

    def __init__(
        self, model: str, adapters: Mapping[str, str], state: Path, roots: Sequence[Path], log: Path
    ) -> None:
        self._arguments = [
            *("serve", model, "--served-model-name", "tiny", "--dtype", "float32", "--device", "cpu"),
            *("--memory", POOL, "--drain-seconds", str(DRAIN_S)),
            *("--state-dir", str(state), "--on-adapter-error", "skip"),
            *(part for root in roots for part in ("--adapter-root", str(root))),
            *(part for name, path in adapters.items() for part in ("--adapter", f"{name}={path}")),
        ]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._absences: list[tuple[float, float]] = []
        self._left_at: float | None = time.monotonic()
        self.port = self.grpc_port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def was_away(self, since: float) -> bool:
        """Whether there was no server at some time since then."""
        return self._left_at is not None or any(end >= since for _, end in self._absences)

    async def start(self) -> None:
        """Returns when it is ready; takes the ports it had before."""
        self.close()
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("LORASERVE_SOAK")
        }
        ports = ("--http-port", str(self.port), "--grpc-port", str(self.grpc_port))
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "loraserve", *self._arguments, *ports],
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )
        assert self._process.stdout is not None
        reading = asyncio.get_running_loop().run_in_executor(None, self._process.stdout.readline)
        ready = (await asyncio.wait_for(reading, READY_S)).decode()
        assert ready, self._log.read_text()[-3000:]
        found = READY.match(ready)
        assert found, ready
        self.grpc_port, self.port = map(int, found.groups())
        if self._left_at is not None:
            self._absences.append((self._left_at, time.monotonic()))
            self._left_at = None

    async def pause(self, seconds: float) -> None:
        """As a machine that is put to sleep."""
        self.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """At once, as a machine that loses its power."""
        self._left_at = time.monotonic()
        self.process.kill()
        self.process.wait()

    async def stop(self) -> float:
        """SIGTERM; the seconds until the process had ended."""
        started = self._left_at = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        await asyncio.get_running_loop().run_in_executor(None, self.process.wait, READY_S)
        return time.monotonic() - started

    def close(self) -> None:
        """Whatever is left of it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()

    async def idle(self) -> Idle:
        """When nothing runs or waits any more; AssertionError if that does not come."""
        until = time.monotonic() + IDLE_S
        async with httpx.AsyncClient(base_url=self.url, timeout=IDLE_S) as client:
            while True:
                stats = (await client.get("/dashboard/stats")).json()
                if not (stats["running"] or stats["waiting"] or stats["pages"]["kv"]):
                    break
                assert time.monotonic() < until, f"the server does not become idle: {stats}"
                await asyncio.sleep(0.1)
        await asyncio.sleep(1.0)  # connections that callers left are closed
        proc = Path("/proc") / str(self.process.pid)
        rss = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        return Idle(
            stats["pages"], len(list((proc / "fd").iterdir())), len(list((proc / "task").iterdir())), rss
        )

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The one that runs, or ran last."""
        assert self._process is not None
        return self._process
