"""`AppDispatcher`: lines as calls of the HTTP application in this process: its bodies, checks and answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

import orjson
from starlette.types import ASGIApp, Message

from loraserve.errors import EngineStoppedError
from loraserve.server.batches.lines import Line
from loraserve.server.batches.results import Answer

if TYPE_CHECKING:
    from loraserve.server.access.keys import Caller

# In the scope of a call that comes from inside:
CALLER: Final = "loraserve.caller"
ON_BEGUN: Final = "loraserve.on_begun"  # called when the first token has come
MAX_RETRY_S = 5.0
NOT_IN_BATCHES = frozenset(("administration", "batches", "TGI"))  # tags of routes


class Dispatcher(Protocol):
    """Whoever answers lines."""

    async def send(
        self, line: Line, stop: asyncio.Event, on_begun: Callable[[], None] = lambda: None
    ) -> Answer | None:
        """The answer, however long that takes; None once `stop` is set, if it had not come by then.

        Args:
            line: what is asked.
            stop: set when the answer is not wanted any more.
            on_begun: called where it is known that the first token has come.

        Raises:
            LoraserveError: nothing is answered any more, the run can't go on.
        """
        ...


class AppDispatcher:
    """Calls an application as its listener would.

    Args:
        app: ASGI.
        caller: whose lines they are; None is whoever sits at this machine.
    """

    def __init__(self, app: ASGIApp, caller: Caller | None = None) -> None:
        self._app = app
        self._caller = caller

    async def send(
        self, line: Line, stop: asyncio.Event, on_begun: Callable[[], None] = lambda: None
    ) -> Answer | None:
        """As of `Dispatcher`; too busy a server, and a caller's rate, are waited for.

        Raises:
            EngineStoppedError: the engine takes no requests any more.
        """
        while not stop.is_set():
            call = _AppCall(line, self._caller, stop, on_begun)
            await call.run(self._app)
            if stop.is_set() and not call.is_success:
                return None
            if call.status == 503:
                raise EngineStoppedError(f"the engine takes no requests any more: {call.text[:500]}")
            if call.status != 429:
                return Answer(call.status, call.header("x-request-id"), json_line(call.body))
            await _wait(stop, call.header("retry-after"))
        return None


class _AppCall:
    def __init__(
        self, line: Line, caller: Caller | None, stop: asyncio.Event, on_begun: Callable[[], None]
    ) -> None:
        self.status = 500
        self.body = b""
        self._headers: Mapping[bytes, bytes] = {}
        self._line = line
        self._caller = caller
        self._stop = stop
        self._on_begun = on_begun
        self._is_sent = False

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")

    def header(self, name: str) -> str:
        return self._headers.get(name.encode(), b"").decode("latin-1")

    async def run(self, app: ASGIApp) -> None:
        await app(self._scope(), self._receive, self._send)

    def _scope(self) -> dict[str, Any]:
        length = b"%d" % len(self._line.body)
        path = self._line.url
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [
                (b"host", b"localhost"),
                (b"content-type", b"application/json"),
                (b"content-length", length),
            ],
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 0),
        }
        scope[ON_BEGUN] = self._on_begun
        if self._caller is not None:
            scope[CALLER] = self._caller
        return scope

    async def _receive(self) -> Message:
        if not self._is_sent:
            self._is_sent = True
            return {"type": "http.request", "body": self._line.body, "more_body": False}
        await self._stop.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._headers = dict(message["headers"])
        else:
            self.body += message.get("body", b"")


async def _wait(stop: asyncio.Event, retry_after: str) -> None:
    seconds = min(float(retry_after), MAX_RETRY_S) if retry_after.isdigit() else MAX_RETRY_S
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except asyncio.TimeoutError:
        return


def json_line(body: bytes) -> bytes:
    """A body as JSON without line ends; what is no JSON becomes a string."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return orjson.dumps(body.decode(errors="replace"))
    return body if b"\n" not in body and b"\r" not in body else orjson.dumps(value)


def batch_urls(document: Mapping[str, Any]) -> frozenset[str]:
    """Paths of an OpenAPI document that take a JSON body and answer in one piece."""
    return frozenset(
        path
        for path, operations in document["paths"].items()
        if "post" in operations
        and "{" not in path
        and not NOT_IN_BATCHES.intersection(operations["post"].get("tags", ()))
        and "application/json" in operations["post"].get("requestBody", {}).get("content", {})
    )
