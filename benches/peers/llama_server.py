"""A llama-server process and HTTP to it; needs nothing but Python's library."""

import ctypes
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 60
PR_SET_PDEATHSIG = 1


class LlamaServer:
    """Raises RuntimeError if it doesn't get ready, or answers with an error. It logs to standard error."""

    def __init__(self, program: str | Path, options: Mapping[str, object]) -> None:
        self._port = free_port()
        command = [program, "--offline", "--lora-init-without-apply", "--port", self._port]
        command += [part for option in options.items() for part in option]
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdout=sys.stderr,
            preexec_fn=end_with_parent,  # noqa: PLW1509  no thread runs yet
        )
        self._await_ready()

    def post(self, body: dict[str, Any]) -> http.client.HTTPResponse:
        """To /completion."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise RuntimeError(f"llama-server answered {response.status}: {response.read().decode()}")
        return response

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _await_ready(self) -> None:
        deadline = time.perf_counter() + START_TIMEOUT_S
        while not self._is_healthy():
            if self._process.poll() is not None:
                raise RuntimeError(f"llama-server ended with status {self._process.returncode}")
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


def end_with_parent() -> None:
    """In the new process: it would spin on where its parent is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
