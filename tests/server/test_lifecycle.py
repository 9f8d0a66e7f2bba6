"""A server process from its ready line to its exit code, on the real engine."""

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from loraserve import EngineConfig
from loraserve.client import Client
from loraserve.errors import EngineStoppedError
from loraserve.request import Completion
from loraserve.sampling_params import SamplingParams
from loraserve.server.lifecycle import ServeConfig, serve

from tests.server.fake_engine import FakeEngine

EXIT_TIMEOUT_S = 20.0


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


@contextmanager
def server_process(*options: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """(process, address, ready line) of a server on a free port; killed at the end if still there."""
    command = [
        sys.executable,
        "-m",
        "loraserve",
        "serve",
        "smollm2",
        "--grpc-port",
        "0",
        "--memory",
        "256MiB",
    ]
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, *options], stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            yield process, ready.split()[3].rstrip(","), ready
        finally:
            process.kill()


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones() -> None:
    with server_process() as (process, address, ready), Client(address) as client:
        assert ready == f"loraserve ready: grpc {address}, model smollm2, adapters none\n"
        client.wait_ready(1.0)
        stream, answer = client.stream("Once upon a time", params(100)), Completion()
        answer.append(next(stream))
        process.send_signal(signal.SIGTERM)
        assert _is_refused_soon(client)
        for delta in stream:
            answer.append(delta)
        assert process.wait(EXIT_TIMEOUT_S) == 0
    assert (len(answer.token_ids), answer.finish_reason) == (100, "length")


def test_requests_still_running_at_the_deadline_end_with_abort() -> None:
    with server_process("--drain-seconds", "0.2") as (process, address, _), Client(address) as client:
        stream = client.stream("Once upon a time", params(2000))
        next(stream)
        process.send_signal(signal.SIGINT)
        reasons = [delta.finish_reason for delta in stream]
        assert process.wait(EXIT_TIMEOUT_S) == 0
    assert reasons[-1] == "abort"


def test_a_second_signal_ends_the_process_at_once() -> None:
    with server_process("--drain-seconds", "60") as (process, address, _), Client(address) as client:
        stream = client.stream("Once upon a time", params(2000))
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert _is_refused_soon(client)
        process.send_signal(signal.SIGTERM)
        assert process.wait(EXIT_TIMEOUT_S) == 128 + signal.SIGTERM
        with pytest.raises(EngineStoppedError):
            list(stream)


def test_a_port_in_use_is_one_line_and_fails_before_the_model_is_opened() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        command = [sys.executable, "-m", "loraserve", "serve", "./none", "--grpc-port", port]
        server = subprocess.run(command, check=False, capture_output=True, text=True, timeout=EXIT_TIMEOUT_S)
    assert server.returncode == 1
    assert server.stderr == (
        f"loraserve: error: port {port} on 127.0.0.1 is in use, "
        "choose another with --grpc-port (0 takes a free one)\n"
    )


def _is_refused_soon(client: Client) -> bool:
    """Whether the server refuses new requests with the engine's words within five seconds."""
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        try:
            client.generate("x", params(1))
        except EngineStoppedError as error:
            return "shutting down" in str(error)
        time.sleep(0.01)
    return False


def test_a_server_whose_engine_fails_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class FailingEngine(FakeEngine):
        def __init__(self, _config: EngineConfig) -> None:
            super().__init__()

        async def wait_failed(self) -> str:
            return "the engine failed: broken"

    monkeypatch.setattr("loraserve.async_engine.AsyncEngine", FailingEngine)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(EngineStoppedError, match="broken"):
            asyncio.run(serve(ServeConfig(engine=EngineConfig(model="none"), grpc_port=0)))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
