"""A server that is stopped and started again serves what was added to it at run time."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from loraserve.client import Client
from loraserve.sampling_params import SamplingParams

from tests.e2e.tiny import NUM_TOKENS, PROMPT

EXIT_TIMEOUT_S = 300.0
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)


def command(model: Path, *options: str) -> list[str]:
    ports = ["--grpc-port", "0", "--http-port", "0"]
    engine = ["--device", "cpu", "--dtype", "float32", "--memory", "16MiB", "--threads", "1"]
    return [sys.executable, "-m", "loraserve", "serve", str(model), *ports, *engine, *options]


@contextmanager
def serving(model: Path, *options: str) -> Iterator[tuple[httpx.Client, Client]]:
    """HTTP and gRPC clients of a server, which is stopped at the end."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command(model, *options), stdout=pipe, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            grpc, http = ready.split()[3].rstrip(","), ready.split(", ")[1].removeprefix("http ")
            with (
                httpx.Client(base_url=http, timeout=300.0) as http_client,
                Client(grpc, timeout=300.0) as grpc_client,
            ):
                yield http_client, grpc_client
            process.send_signal(signal.SIGTERM)
            assert process.wait(EXIT_TIMEOUT_S) == 0
        finally:
            process.kill()


def served(http: httpx.Client) -> dict[str, tuple[str, bool]]:
    adapters: list[dict[str, Any]] = http.get("/adapters").json()["adapters"]
    return {adapter["name"]: (adapter["path"], adapter["pinned"]) for adapter in adapters}


@pytest.fixture
def root(tmp_path: Path, tiny_adapters: dict[str, str]) -> Path:
    for name in ("a0", "a1", "a2", "a3"):
        shutil.copytree(tiny_adapters[name], tmp_path / "root" / name)
    return tmp_path / "root"


def test_adapters_of_run_time_survive_a_restart(
    tiny_model: tuple[Path, torch.nn.Module], tmp_path: Path, root: Path
) -> None:
    model, state = tiny_model[0], str(tmp_path / "state")
    options = ["--adapter", f"fixed={root / 'a0'}", "--adapter-root", str(root), "--state-dir", state]
    manifest = {"description": "of run time", "sampling": {"max_tokens": 3}}
    with serving(model, *options) as (http, grpc):
        body = {"name": "one", "source": "a1", "pin": True, "manifest": manifest}
        assert http.post("/adapters", json=body).status_code == 201
        grpc.load_adapter("two", str(root / "a1"))
        grpc.load_adapter("two", str(root / "a2"), replace=True)
        grpc.load_adapter("three", str(root / "a3"))
        assert http.delete("/adapters/three").status_code == 204
        grpc.load_adapter("four", str(root / "a3"))
        grpc.unload_adapter("fixed")
        answers = [grpc.generate(PROMPT, GREEDY, adapter=name)[0].token_ids for name in ("one", "two")]
        assert set(served(http)) == {"one", "two", "four"}
        second = subprocess.run(
            command(model, *options), check=False, capture_output=True, text=True, timeout=EXIT_TIMEOUT_S
        )
        assert (second.returncode, second.stdout) == (1, "")
        assert f"error: state directory {state} is another server's" in second.stderr

    shutil.rmtree(root / "a3")
    failed = subprocess.run(
        command(model, *options), check=False, capture_output=True, text=True, timeout=EXIT_TIMEOUT_S
    )
    assert failed.returncode == 1
    assert f"error: adapter 'four' of {root / 'a3'}" in failed.stderr

    with serving(model, *options, "--on-adapter-error", "skip") as (http, grpc):
        assert served(http) == {
            "fixed": (str(root / "a0"), False),
            "one": (str(root / "a1"), True),
            "two": (str(root / "a2"), False),
        }
        assert [entry["name"] for entry in http.get("/adapters").json()["failed"]] == ["four"]
        assert http.get("/adapters/one").json()["description"] == "of run time"
        again = [grpc.generate(PROMPT, GREEDY, adapter=name)[0].token_ids for name in ("one", "two")]
        assert again == answers
        grpc.unload_adapter("four")

    with serving(model, *options) as (http, _):
        assert set(served(http)) == {"fixed", "one", "two"}

    elsewhere = ["--adapter-root", str(tmp_path / "other"), "--state-dir", state]
    outside = subprocess.run(
        command(model, *elsewhere), check=False, capture_output=True, text=True, timeout=EXIT_TIMEOUT_S
    )
    assert outside.returncode == 1
    assert "2 adapters can't be served" in outside.stderr
    assert "is not under an adapter root" in outside.stderr
