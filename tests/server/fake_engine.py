"""An engine without a model: the prompt says how it behaves, so errors and hangs can be had at will."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from loraserve import errors
from loraserve.adapters.startup import AdapterFailure
from loraserve.request import Delta, GenerateRequest, Usage


class FakeStream:
    """Words of the prompt as deltas; "late CLASS" fails after one, "hang" never ends, "cut" is aborted."""

    prompt_token_ids = (1, 2, 3)
    generations: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, request: GenerateRequest) -> None:
        assert isinstance(request.prompt, str)
        self._words = request.prompt.split()
        self.aborted = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        for index, word in enumerate(self._words):
            yield Delta(0, word, [index], None, None, None)
            if self._words[0] == "late":
                raise error_named(self._words[1])
            if self._words[0] == "hang":
                await asyncio.Event().wait()
            if self._words[0] == "cut":
                yield Delta(0, "", [], None, "abort", Usage(1, 1, 0))
                return
        yield Delta(0, "", [], None, "stop", Usage(1, len(self._words), 0))

    def abort(self) -> None:
        self.aborted.set()


@dataclass
class FakePrepared:
    """A word is a token."""

    request: GenerateRequest

    @property
    def prompt_token_ids(self) -> list[int]:
        prompt = self.request.prompt
        return list(range(len(prompt.split()))) if isinstance(prompt, str) else list(prompt or [])


class FakeEngine:
    """Refuses "refuse CLASS" prompts with that error; remembers its streams and its requests."""

    adapter_failures: tuple[AdapterFailure, ...] = ()

    def __init__(self) -> None:
        self.streams: list[FakeStream] = []
        self.requests: list[GenerateRequest] = []

    async def prepare(self, request: GenerateRequest) -> FakePrepared:
        return FakePrepared(request)

    async def submit(self, prepared: FakePrepared) -> FakeStream:
        request = prepared.request
        self.requests.append(request)
        if isinstance(request.prompt, str) and request.prompt.startswith("refuse"):
            raise error_named(request.prompt.split()[1])
        self.streams.append(FakeStream(request))
        return self.streams[-1]

    def num_waiting(self) -> int:
        return 0

    def info(self) -> Any:
        return SimpleNamespace(
            base_fingerprint="base1:ab",
            quantization=None,
            weights_nbytes=2**28,
            adapter_dtype="float32",
            device="cpu",
            dtype="float32",
            num_pages=16,
            page_nbytes=2**20,
            max_model_len=512,
            max_lora_rank=64,
            num_adapters=1,
        )

    def get_ready(self) -> None:
        pass

    async def shutdown(self, deadline_s: float = 0.0) -> None:
        pass


def error_named(name: str) -> Exception:
    error: Exception = getattr(errors, name, RuntimeError)(f"text of {name}")
    return error
