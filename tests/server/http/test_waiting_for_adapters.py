"""A stream that waits for an adapter that is fetched gets comments, and then its answer or its error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from loraserve.errors import SourceUnavailableError
from loraserve.server.adapters.loading import LoadProgress

from tests.server.http.fake_engine import FakeEngine
from tests.server.http.http_thread import HttpThread

COMMENT = ": the adapter is being fetched, 5 bytes so far"


class SlowResolver:
    """Takes half a second to fetch anything; "gone" then has no source."""

    names: tuple[str, ...] = ()

    def progress(self, names: Iterable[str]) -> LoadProgress | None:
        return LoadProgress("downloading", 5, 10) if set(names) else None

    @asynccontextmanager
    async def using(self, names: Sequence[str], wait_s: float) -> AsyncIterator[None]:
        await asyncio.sleep(0.5 if names else 0.0)
        if "gone" in names:
            raise SourceUnavailableError("the source does not answer", retry_after_s=3.0)
        yield


def ask(url: str, model: str, *, stream: bool) -> httpx.Response:
    body: dict[str, Any] = {"model": model, "prompt": "one two", "stream": stream}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=30.0)


def test_comments_come_before_the_answer_or_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraserve.server.http.answer.KEEP_ALIVE_S", 0.1)
    resolver: Any = SlowResolver()
    with HttpThread(FakeEngine, resolver=resolver) as server:
        lines = ask(server.url, "one", stream=True).text.splitlines()
        assert lines[0] == COMMENT
        assert lines[-2] == "data: [DONE]"
        assert [line for line in lines if line.startswith("data: {")]
        failed = ask(server.url, "gone", stream=True)
        assert (failed.status_code, failed.text.splitlines()[0]) == (200, COMMENT)
        assert "the source does not answer" in failed.text
        whole = ask(server.url, "gone", stream=False)
        assert (whole.status_code, whole.headers["retry-after"]) == (503, "3")
        at_once = ask(server.url, "base", stream=True).text
        assert COMMENT not in at_once


def test_an_error_that_comes_before_any_comment_has_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver: Any = SlowResolver()
    with HttpThread(FakeEngine, resolver=resolver) as server:
        assert ask(server.url, "gone", stream=True).status_code == 503
