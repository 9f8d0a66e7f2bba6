"""Sources of adapters that never answer hold up nobody, neither who generates nor the end of the process."""

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.peft_writer import SMOLLM2_135M, write_adapter
from tests.server.test_lifecycle import http_url, server_process

NUM_LOADS = 12  # more than there are threads of any kind
DRAIN_S = 1.0
EXIT_S = 12.0  # two on a machine that does nothing else; a hanging download takes minutes
ANSWER_TIMEOUT_S = 60.0
QUESTION = {"prompt": "hello", "max_tokens": 4}


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A Hub that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        yield


def post(url: str, path: str, body: object, timeout: float = ANSWER_TIMEOUT_S) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, timeout=timeout)


@pytest.mark.usefixtures("silent_hub")
def test_downloads_that_hang_hold_up_neither_requests_nor_the_end(tmp_path: Path) -> None:
    options = ("--drain-seconds", str(DRAIN_S), "--adapter-root", str(tmp_path))
    with server_process(*options) as (process, _, ready), ThreadPoolExecutor(NUM_LOADS) as callers:
        url = http_url(ready)
        assert post(url, "/v1/completions", QUESTION).status_code == 200
        for index in range(NUM_LOADS):
            body = {"name": f"n{index}", "source": f"hf://owner/name{index}"}
            callers.submit(_ignore_errors, url, body)
        time.sleep(1.0)
        assert post(url, "/v1/completions", QUESTION).json()["usage"]["completion_tokens"] == 4
        assert httpx.get(f"{url}/health", timeout=ANSWER_TIMEOUT_S).status_code == 200
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(60.0) in (0, 1)
        assert time.monotonic() - started < DRAIN_S + EXIT_S


@pytest.mark.parametrize("name", ["loraserve.json", "adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path / "good", SMOLLM2_135M, rank=2)
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    (tmp_path / "bad" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "bad" / name)
    with server_process("--adapter-root", str(tmp_path)) as (_, _, ready):
        url = http_url(ready)
        refused = post(url, "/adapters", {"name": "bad", "source": str(tmp_path / "bad")})
        assert refused.status_code == 400, refused.text
        assert name in json.dumps(refused.json())
        assert post(url, "/adapters", {"name": "good", "source": str(tmp_path / "good")}).status_code == 201


def _ignore_errors(url: str, body: object) -> None:
    with suppress(httpx.HTTPError):
        post(url, "/adapters", body, 20.0)
