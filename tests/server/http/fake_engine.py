"""An engine without a model, for HTTP: the prompt says how it behaves, with errors and hangs at will."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

from loraserve.errors import OverloadedError
from loraserve.request import Delta, GenerateRequest, TokenLogprob, Usage

from tests.server.fake_engine import error_named

FLOOD_TEXT = "x" * 65536


class FakeTokenizer:
    special_ids: frozenset[int] = frozenset()
    eos_token_ids: tuple[int, ...] = ()
    max_token_len = 8

    def check_fits(self, text: str, max_num_tokens: int, what: str) -> None:
        pass

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return " ".join(f"<{token_id}>" for token_id in ids)


TOKENIZER = FakeTokenizer()


class FakeStream:
    """Words of the prompt as deltas; "late CLASS" fails after one, "hang" waits, "flood" never stops, "cut"
    is aborted."""

    prompt_token_ids = (1, 2, 3)
    generations: ClassVar[dict[str, int]] = {}
    tokenizer = TOKENIZER

    def __init__(self, request: GenerateRequest) -> None:
        self._words = request.prompt.split() if isinstance(request.prompt, str) else ["token", "ids"]
        self.aborted = asyncio.Event()
        self.num_deltas = 0

    async def __aiter__(self) -> AsyncIterator[Delta]:
        if self._words[0] == "silent":
            await self.aborted.wait()
        for index, word in enumerate(self._words):
            yield self._delta(index, word)
            if self._words[0] == "late":
                raise error_named(self._words[1])
            if self._words[0] == "hang":
                await self.aborted.wait()
            while self._words[0] == "flood" and not self.aborted.is_set():
                yield self._delta(index, FLOOD_TEXT)
                await asyncio.sleep(0)
            if self.aborted.is_set():
                return
            if self._words[0] == "cut":
                yield Delta(0, "", [], None, "abort", Usage(3, 1, 0))
                return
        yield Delta(0, "", [], None, "stop", Usage(3, len(self._words), 0))

    def _delta(self, index: int, text: str) -> Delta:
        self.num_deltas += 1
        return Delta(0, text, [index], [TokenLogprob(index, -1.0, [])], None, None)

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

    tokenizer = TOKENIZER

    def __init__(self) -> None:
        self.streams: list[FakeStream] = []
        self.requests: list[GenerateRequest] = []

    def num_waiting(self) -> int:
        return 0

    def info(self) -> Any:
        return SimpleNamespace(model="fake", max_model_len=1024, device="cpu")

    def answer_fingerprint(self, adapter: Any = None) -> str:
        return f"{adapter}"

    def adapters(self) -> list[Any]:
        return [SimpleNamespace(name=name, path=f"/adapters/{name}") for name in ("one", "two")]

    async def prepare(self, request: GenerateRequest) -> FakePrepared:
        return FakePrepared(request)

    async def submit(self, prepared: FakePrepared) -> FakeStream:
        request = prepared.request
        self.requests.append(request)
        words = request.prompt.split() if isinstance(request.prompt, str) else []
        if words[:2] == ["refuse", "busy"]:
            raise OverloadedError("1024 requests wait, limit is 1024", retry_after_s=2.5, reason="busy")
        if words[:2] == ["refuse", "loading"]:
            raise OverloadedError("1024 wait for adapters", retry_after_s=0.2, reason="adapter_loading")
        if words[:1] == ["refuse"]:
            raise error_named(words[1])
        self.streams.append(FakeStream(request))
        return self.streams[-1]

    async def shutdown(self, deadline_s: float = 0.0) -> None:
        pass
