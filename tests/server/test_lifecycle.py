"""A server process from its ready line to its exit code, on the real engine."""

import asyncio
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from loraserve import EngineConfig
from loraserve.client import Client
from loraserve.errors import EngineStoppedError, PermissionDeniedError
from loraserve.request import Completion
from loraserve.sampling_params import SamplingParams
from loraserve.server.lifecycle import SAME_SIGNAL_S, serve, start_facts
from loraserve.settings.load import load_settings

from tests.peft_writer import SMOLLM2_135M, write_adapter
from tests.server.certificates import Authority
from tests.server.fake_engine import FakeEngine

EXIT_TIMEOUT_S = 20.0


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


@contextmanager
def server_process(
    *options: str, stderr: int = subprocess.DEVNULL
) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """(process, address, ready line) of a server on a free port; killed at the end if still there."""
    command = [
        sys.executable,
        "-m",
        "loraserve",
        "serve",
        "smollm2",
        "--grpc-port",
        "0",
        "--http-port",
        "0",
        "--memory",
        "256MiB",
    ]
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, *options], stdout=pipe, stderr=stderr, text=True) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            yield process, ready.split()[3].rstrip(","), ready
        finally:
            process.kill()


def http_url(ready: str) -> str:
    return ready.split(", ")[1].removeprefix("http ")


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones() -> None:
    with server_process() as (process, address, ready), Client(address) as client:
        url = http_url(ready)
        assert ready == f"loraserve ready: grpc {address}, http {url}, model smollm2, adapters none\n"
        client.wait_ready(1.0)
        stream, answer = client.stream("Once upon a time", params(100)), Completion()
        answer.append(next(stream))
        process.send_signal(signal.SIGTERM)
        assert _is_refused_soon(client)
        for delta in stream:
            answer.append(delta)
        assert process.wait(EXIT_TIMEOUT_S) == 0
    assert (len(answer.token_ids), answer.finish_reason) == (100, "length")


def test_a_lost_rank_ends_the_server_which_says_so_and_leaves_no_process() -> None:
    options = ("--tensor-parallel-size", "3", "--quantization", "none")
    with server_process(*options, stderr=subprocess.PIPE) as (process, address, _), Client(address) as client:
        children = psutil.Process(process.pid).children()
        ranks = [child for child in children if any("tensor_parallel" in word for word in child.cmdline())]
        assert len(ranks) == 2
        client.wait_ready(EXIT_TIMEOUT_S)
        stream = client.stream("Once upon a time", params(2000))
        next(stream)
        ranks[1].send_signal(signal.SIGKILL)
        reason = rf"rank 2 \(process {ranks[1].pid}\) was killed by signal 9"
        with pytest.raises(EngineStoppedError, match=reason):
            list(stream)
        assert process.wait(EXIT_TIMEOUT_S) == 1  # whoever watches over it starts it again
        assert process.stderr is not None
        assert re.search(reason, process.stderr.read())
        _, alive = psutil.wait_procs(ranks, EXIT_TIMEOUT_S)
        assert alive == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=["SIGINT", "SIGHUP"])
def test_requests_still_running_at_the_deadline_end_with_abort(number: signal.Signals) -> None:
    with server_process("--drain-seconds", "0.2") as (process, address, _), Client(address) as client:
        stream = client.stream("Once upon a time", params(2000))
        next(stream)
        process.send_signal(number)
        reasons = [delta.finish_reason for delta in stream]
        assert process.wait(EXIT_TIMEOUT_S) == 0
    assert reasons[-1] == "abort"


def test_two_signals_at_once_are_one() -> None:
    with server_process("--drain-seconds", "30") as (process, address, _), Client(address) as client:
        stream, num_tokens = client.stream("Once upon a time", params(50)), 0
        next(stream)
        process.send_signal(signal.SIGSTOP)  # so that both are there when it looks
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        for delta in stream:
            num_tokens += len(delta.token_ids)
        assert process.wait(EXIT_TIMEOUT_S) == 0
    assert num_tokens == 49


def test_a_second_signal_ends_the_process_at_once() -> None:
    with server_process("--drain-seconds", "60") as (process, address, _), Client(address) as client:
        stream = client.stream("Once upon a time", params(2000))
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert _is_refused_soon(client)
        time.sleep(SAME_SIGNAL_S)
        process.send_signal(signal.SIGTERM)
        assert process.wait(EXIT_TIMEOUT_S) == 128 + signal.SIGTERM
        with pytest.raises(EngineStoppedError):
            list(stream)


@pytest.mark.parametrize(
    ("flag", "other_flag"), [("--grpc-port", "--http-port"), ("--http-port", "--grpc-port")]
)
def test_a_port_in_use_is_one_line_and_fails_before_the_model_is_opened(flag: str, other_flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        command = [sys.executable, "-m", "loraserve", "serve", "./none", flag, port, other_flag, "0"]
        server = subprocess.run(command, check=False, capture_output=True, text=True, timeout=EXIT_TIMEOUT_S)
    assert server.returncode == 1
    assert server.stderr == (
        f"loraserve: error: port {port} on 127.0.0.1 is in use, "
        f"choose another with {flag} (0 takes a free one)\n"
    )


def test_a_server_whose_output_is_full_serves() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "loraserve", "serve", "smollm2", "--memory", "256MiB"]
    with (
        Path("/dev/full").open("w") as full,
        subprocess.Popen(
            [*command, "--grpc-port", str(port)], stdout=full, stderr=subprocess.PIPE, text=True
        ) as process,
    ):
        try:
            with Client(f"127.0.0.1:{port}") as client:
                client.wait_ready(60.0)
                assert client.generate("Once", params(3))[0].token_ids
            process.send_signal(signal.SIGTERM)
            assert process.wait(EXIT_TIMEOUT_S) == 0
        finally:
            process.kill()
        assert process.stderr is not None
        said = process.stderr.read()
    assert "the start-up lines can't be printed: No space left on device" in said
    assert "Traceback" not in said


def test_http_drains_as_grpc_does() -> None:
    with (
        server_process() as (process, _, ready),
        httpx.Client(base_url=http_url(ready), timeout=60) as client,
    ):
        assert client.get("/ready").status_code == 200
        body = {"model": "smollm2", "prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert _is_not_ready_soon(http_url(ready))
            refused = httpx.post(f"{http_url(ready)}/v1/completions", json=body | {"stream": False})
            assert (refused.status_code, "shutting down" in refused.text) == (503, True)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2].replace(" ", "")
        assert process.wait(EXIT_TIMEOUT_S) == 0


def test_one_server_can_be_off() -> None:
    with server_process("--grpc-port", "off") as (process, _, ready):
        url = ready.split()[3].rstrip(",")
        assert ready == f"loraserve ready: http {url}, model smollm2, adapters none\n"
        assert httpx.get(f"{url}/info").json()["model_id"] == "smollm2"
        process.send_signal(signal.SIGTERM)
        assert process.wait(EXIT_TIMEOUT_S) == 0


def test_keys_logs_and_adapters_come_from_a_file(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapters/sql", SMOLLM2_135M, rank=4, scale=0.2)
    write_adapter(tmp_path / "adapters/later", SMOLLM2_135M, rank=4, scale=0.2, seed=2)
    (tmp_path / "loraserve.yaml").write_text(
        """
served_model_name: base
adapters: {sql: {path: adapters/sql, pin: true, manifest: {description: answers in SQL}}}
adapter_root: adapters
keys:
  - {name: sales, secret: sales-key, adapters: ["sql"], base_model: false}
  - {name: root, secret: root-key, admin: true}
"""
    )
    options = ["--config", str(tmp_path / "loraserve.yaml"), "--log-format", "json"]
    sales, root = ({"authorization": f"Bearer {name}-key"} for name in ("sales", "root"))
    body = {"prompt": "Once", "max_tokens": 4}
    with (
        server_process(*options, stderr=subprocess.PIPE) as (process, address, ready),
        httpx.Client(base_url=http_url(ready), timeout=60) as client,
    ):
        models = client.get("/v1/models", headers=sales).json()["data"]
        assert [model["id"] for model in models] == ["sql"]
        completion = client.post(
            "/v1/completions", json=body | {"model": "sql"}, headers=sales | {"x-request-id": "r-1"}
        )
        assert completion.status_code == 200
        assert client.post("/v1/completions", json=body | {"model": "base"}, headers=sales).status_code == 403
        assert client.post("/v1/completions", json=body | {"model": "sql"}).status_code == 401
        with Client(address, api_key="sales-key") as caller, pytest.raises(PermissionDeniedError):
            caller.generate("Once", params(4))
        load = {"name": "later", "source": str(tmp_path / "adapters/later"), "warm": True}
        assert client.post("/adapters", json=load, headers=root).json()["state"] == "resident"
        assert client.post("/adapters", json=load | {"source": "/etc"}, headers=root).status_code == 403
        listed = {entry["name"]: entry for entry in client.get("/adapters", headers=root).json()["adapters"]}
        assert (listed["sql"]["pinned"], listed["sql"]["description"]) == (True, "answers in SQL")
        metrics = client.get("/metrics", headers=root).text
        assert 'loraserve_adapter_requests_total{adapter="sql"} 1.0' in metrics
        assert 'loraserve_requests_total{outcome="refused",route="grpc"} 1.0' in metrics
        process.send_signal(signal.SIGTERM)
        assert process.wait(EXIT_TIMEOUT_S) == 0
        assert process.stderr is not None
        records = [json.loads(line) for line in process.stderr]
    finished = next(record for record in records if record.get("request_id") == "r-1")
    assert (finished["adapter"], finished["outcome"], finished["tokens"]) == ("sql", "success", 4)
    assert finished["logger"] == "loraserve.request"
    assert not any("-key" in json.dumps(record) for record in records)


def test_tls_serves_both(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    files = authority.issue("server")
    options = ["--tls-certificate", str(files.certificate), "--tls-key", str(files.key)]
    context = ssl.create_default_context(cafile=str(authority.certificate))
    credentials = grpc.ssl_channel_credentials(authority.certificate.read_bytes())
    with server_process(*options) as (process, address, ready):
        url = http_url(ready)
        assert url.startswith("https://")
        assert httpx.get(f"{url}/health", verify=context).status_code == 200
        with Client(address, credentials=credentials) as client:
            assert len(client.generate("Once", params(4))[0].token_ids) == 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(EXIT_TIMEOUT_S) == 0


def _is_not_ready_soon(url: str) -> bool:
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        if httpx.get(f"{url}/ready").status_code == 503:
            return True
        time.sleep(0.01)
    return False


def _is_refused_soon(client: Client) -> bool:
    """Whether the server refuses new requests with the engine's words within twenty seconds."""
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        try:
            client.generate("x", params(1))
        except EngineStoppedError as error:
            return "shutting down" in str(error)
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(
    ("values", "access"),
    [
        ({}, "no keys: whoever reaches 127.0.0.1 may use everything, this machine administers"),
        (
            {"host": "0.0.0.0"},
            "no keys: whoever reaches 0.0.0.0 may use everything, this machine administers",
        ),
        ({"api_key": "hush"}, "every request needs one of the configured keys"),
        ({"keys": [{"name": "a", "secret": "hush"}]}, "every request needs one of the configured keys"),
    ],
)
def test_a_start_says_what_is_served_and_who_may_come_in(values: dict[str, Any], access: str) -> None:
    given = {"model": "m", "adapters": {"a": "/a", "b": "/b"}, "max_num_seqs": 8, **values}
    lines = start_facts(load_settings(given, {}).settings, FakeEngine().info())
    assert [line.split(None, 1) for line in lines] == [
        ["base", "base1:ab"],
        ["device", "cpu, float32"],
        ["weights", "256 MiB, float32"],
        ["pool", "16 MiB for KV cache and adapters, kept in float32"],
        [
            "limits",
            "512 tokens of context, 8 sequences and 2048 tokens a step, adapters up to rank 64",
        ],
        ["adapters", "1 of 2 configured"],
        ["access", access],
    ]
    assert "hush" not in "".join(lines)


def test_a_start_says_among_how_many_ranks_a_model_is_shared_out() -> None:
    given = {"model": "/model", "tensor_parallel_size": 2}
    text = "\n".join(start_facts(load_settings(given, {}).settings, FakeEngine().info()))
    assert "cpu, float32, shared out among 2 ranks\n" in text
    assert "16 MiB in each for KV cache" in text


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
            asyncio.run(serve(load_settings({"model": "none", "grpc_port": 0, "http_port": "off"}, {})))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
