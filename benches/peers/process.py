"""A running driver: the bench's end of the line protocol that driver.py describes."""

import json
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from environments import Peer
from precisions import Precision

END_TIMEOUT_S = 30


@dataclass(frozen=True)
class PeerJob:
    """`distinct` adapters in the batch, 0 for none; `threads` of the engine."""

    distinct: int
    threads: int
    precision: Precision


class PeerProcess:
    """One peer serving one popularity; `hello` holds its engine, settings and the time it took to start."""

    def __init__(self, peer: Peer, python: Path, data: Path, job: PeerJob) -> None:
        work = python.parents[1] / "models" / data.name
        work.mkdir(parents=True, exist_ok=True)
        self.log = python.parents[2] / f"{peer.name}.log"
        command = [python, peer.driver, "--data", data, "--work", work]
        command += ["--distinct", job.distinct, "--threads", job.threads, "--precision", job.precision.name]
        self._name = peer.name
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.hello = self._read()

    def run(self, what: str) -> dict[str, Any]:
        """Run "batch" or "stream" once. Raises RuntimeError if the driver ended."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the read says why
            print(json.dumps({"run": what}), file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise RuntimeError(f"the driver of {self._name} ended with status {status}, see {self.log}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def __enter__(self) -> "PeerProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
