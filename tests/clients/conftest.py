"""A server with a tiny model of Qwen's form, for clients of other packages (the extra `clients`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from loraserve import AsyncEngine, EngineConfig

from tests.server.http.http_thread import HttpThread
from tests.tools.models import let_models_say, make_family_model


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, hf_smollm2_tokenizer: Any) -> Iterator[HttpThread]:
    """What a user asks behind `SAY` is its answer; random weights make all else, within what is forced."""
    path = make_family_model(tmp_path_factory.mktemp("qwen"), hf_smollm2_tokenizer, "qwen3")
    config = EngineConfig(
        model=path, dtype="float32", memory="256MiB", adapters={}, max_model_len=4096, device="cpu"
    )
    patch = pytest.MonkeyPatch()
    let_models_say(patch)
    with HttpThread(lambda: AsyncEngine(config), served_names=("tiny",)) as server:
        yield server
    patch.undo()
