"""A server on the small model, which bodies and messages are sent to, and what it must hold throughout."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from loraserve import AsyncEngine, EngineConfig

from tests.fuzz import model_files
from tests.peft_writer import llama_shape, write_adapter
from tests.server.http.http_thread import HttpThread

TIMEOUT_S = 60.0
SHAPE = llama_shape(model_files.NUM_LAYERS, model_files.HIDDEN, 2, 1, 16, model_files.INTERMEDIATE)
QUESTION = {"model": "tiny", "prompt": [3, 4, 5], "max_tokens": 4, "temperature": 0}


@contextmanager
def serving(folder: Path) -> Iterator[HttpThread]:
    """The server, with an adapter `a`, and more below `folder` that may be loaded."""
    model = model_files.write_directory(folder / "model")
    adapter = write_adapter(folder / "adapters" / "one", SHAPE, rank=2)
    config = EngineConfig(
        model=str(model), adapters={"a": str(adapter)}, dtype="float32", memory="1MiB", num_threads=1
    )
    with HttpThread(
        lambda: AsyncEngine(config), served_names=("tiny",), adapter_roots=(folder / "adapters",)
    ) as server:
        yield server


@contextmanager
def undisturbed(server: HttpThread, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Afterwards no traceback is in the log, nothing runs on, and a request is answered as it was before."""
    expected = _answer(server)
    threads = threading.active_count()
    with caplog.at_level(logging.WARNING):
        yield
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
    assert _answer(server) == expected
    assert server.engine.info().num_running == 0
    assert threading.active_count() < threads + 32


def _answer(server: HttpThread) -> str:
    response = httpx.post(f"{server.url}/v1/completions", json=QUESTION, timeout=TIMEOUT_S)
    assert response.status_code == 200
    text: str = response.json()["choices"][0]["text"]
    return text
