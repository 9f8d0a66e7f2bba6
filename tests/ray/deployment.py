"""`loraserve deploy` as a process of its own, with Ray on this machine, for the tests that need all of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import httpx
import psutil
from loraserve.cli.deploy import LOCAL_RAY
from prometheus_client.parser import text_string_to_metric_families

START_LIMIT_S = 180.0
STOP_LIMIT_S = 60.0
WAIT_LIMIT_S = 120.0


class Deployment:
    """Serves until the `with` block ends.

    Args:
        arguments: of `loraserve deploy`.
        log: what it prints goes there.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._command = [sys.executable, "-m", "loraserve", "deploy", *arguments]
        self._command += ["--port", "0", "--grpc-port", "0"]
        self._log = log
        self.url = ""
        self.grpc_address = ""

    @property
    def text(self) -> str:
        """What it has printed."""
        return self._log.read_text(errors="replace")

    def __enter__(self) -> Deployment:
        command, environment = self._command, os.environ | {"OMP_WAIT_POLICY": "PASSIVE"} | LOCAL_RAY
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        try:
            ready = self._wait_ready()
        except BaseException:
            self._stop()
            raise
        self.grpc_address, self.url = ready
        self.http = httpx.Client(base_url=self.url, timeout=WAIT_LIMIT_S)
        return self

    def _wait_ready(self) -> tuple[str, str]:
        ends_at = time.monotonic() + START_LIMIT_S
        while time.monotonic() < ends_at and self.process.poll() is None:
            found = self._ready()
            if found is not None:
                return found
            time.sleep(0.2)
        raise AssertionError(f"it did not start:\n{self.text[-4000:]}")

    def _ready(self) -> tuple[str, str] | None:
        """Addresses of gRPC and HTTP, once it has told them."""
        found = re.search(r"loraserve ready: grpc (\S+), http (\S+),", self.text)
        return None if found is None else (found[1], found[2])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        self._stop()

    def _stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_LIMIT_S)
        finally:
            for process in self._processes():
                process.kill()
            self.process.kill()
            self.process.wait()

    def _processes(self) -> list[psutil.Process]:
        return (
            psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        )

    def engines(self) -> list[psutil.Process]:
        """The replicas' processes."""
        return [one for one in self._processes() if "loraserve:engines" in " ".join(one.cmdline()[:1])]

    def listening_addresses(self) -> set[tuple[str, int]]:
        """(IP, port) of all its processes."""
        pids = {one.pid for one in (psutil.Process(self.process.pid), *self._processes())}
        connections = psutil.net_connections("tcp")
        return {
            (one.laddr.ip, one.laddr.port)
            for one in connections
            if one.status == psutil.CONN_LISTEN and one.pid in pids
        }

    def series(self, name: str) -> dict[str, float]:
        """Replica → value of one of its metrics."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return {sample.labels.get("replica", ""): sample.value for sample in samples}

    def wait_for(self, what: Callable[[], bool]) -> None:
        ends_at = time.monotonic() + WAIT_LIMIT_S
        while not what():
            assert time.monotonic() < ends_at, self.text[-4000:]
            time.sleep(0.2)

    def wait_for_replicas(self, number: int) -> None:
        self.wait_for(lambda: self.series("loraserve_replicas") == {"": number})


class ServeRun(Deployment):
    """`serve run` of a config, as KubeRay has it; Serve's proxy listens."""

    def __init__(self, config: Path, port: int, log: Path) -> None:
        super().__init__((), log)
        self._command = [str(Path(sys.executable).parent / "serve"), "run", str(config)]
        self._port = port

    def _ready(self) -> tuple[str, str] | None:
        url = f"http://127.0.0.1:{self._port}"
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready").status_code == 200:
                return "", url
        return None
