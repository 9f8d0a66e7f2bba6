"""`ServerDispatcher`: lines of a batch sent to a running server, which may be away for a while."""

from __future__ import annotations

import asyncio
import http.client
import re
import ssl
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from loraserve.engine.workers import Workers
from loraserve.errors import InvalidRequestError, LoraserveError
from loraserve.server.batches.dispatch import json_line
from loraserve.server.batches.lines import Line
from loraserve.server.batches.results import Answer

CONNECT_S = 10.0
ANSWER_S = 3600.0
GIVE_UP_S = 300.0  # after which a server that answers nothing is not waited for any more
MAX_PAUSE_S = 30.0
AGAIN = frozenset((429, 502, 503, 504))
UNAUTHENTICATED = 401
_URL = re.compile(r"/[A-Za-z0-9_./-]{1,200}")


class ServerError(LoraserveError):
    """The server can't be reached, or lets nobody in; the same command goes on later."""


def check_url(url: str) -> str | None:
    """What a line's url must look like; whether it is served, the server says."""
    return None if _URL.fullmatch(url) else "url must be a path, such as /v1/chat/completions"


class ServerDispatcher:
    """Sends lines over kept connections, one for each that is open.

    Args:
        url: http or https, with or without /v1 at its end.
        key: an API key.
        concurrency: most lines at once.

    Raises:
        InvalidRequestError: it is no such URL.
    """

    def __init__(self, url: str, key: str | None, concurrency: int) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidRequestError(f"--url is {url!r:.200}, give one such as http://127.0.0.1:8000")
        self._url = url
        self._is_tls = parts.scheme == "https"
        self._address = parts.netloc.rpartition("@")[2]
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"content-type": "application/json"}
        if key is not None:
            self._headers["authorization"] = f"Bearer {key}"
        self._senders = Workers("requests of the batch", concurrency, concurrency)
        self._idle: deque[http.client.HTTPConnection] = deque()
        self._answered_at = time.monotonic()

    async def check(self) -> None:
        """Raises ServerError: there is no server, or it does not know the key."""
        try:
            status, _, body = await self._senders.run(self._send, "GET", "/v1/models", None)
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"the server at {self._url} can't be reached: {_reason(error)}") from error
        if status == UNAUTHENTICATED:
            raise self._not_let_in(body)

    async def send(
        self, line: Line, stop: asyncio.Event, on_begun: Callable[[], None] = lambda: None
    ) -> Answer | None:
        """As of `Dispatcher`; while the server is away or busy it is asked again.

        Raises:
            ServerError: it has been away for five minutes, or does not know the key.
        """
        pause_s = 1.0
        while not stop.is_set():
            sending = asyncio.ensure_future(self._senders.run(self._send, "POST", line.url, line.body))
            stopping = asyncio.ensure_future(stop.wait())
            await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not sending.done():
                sending.cancel()
                return None
            problem, wait_s = "", pause_s
            try:
                status, headers, body = sending.result()
            except (OSError, http.client.HTTPException) as error:
                problem = _reason(error)
            else:
                if status == UNAUTHENTICATED:
                    raise self._not_let_in(body)
                if status not in AGAIN:
                    self._answered_at = time.monotonic()
                    return Answer(status, headers.get("x-request-id") or "", json_line(body))
                problem = f"status {status}"
                with suppress(ValueError):
                    wait_s = max(float(headers.get("retry-after", "")), 0.1)
                if status == 429:  # it is there
                    self._answered_at = time.monotonic()
            if time.monotonic() - self._answered_at > GIVE_UP_S:
                raise ServerError(
                    f"the server at {self._url} has answered nothing for {GIVE_UP_S:g} s: {problem}; "
                    "the same command goes on"
                )
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stop.wait(), min(wait_s, MAX_PAUSE_S))
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
        return None

    def close(self) -> None:
        """Ends the connections that nothing is sent over."""
        self._senders.close()
        while self._idle:
            self._idle.pop().close()

    def _not_let_in(self, body: bytes) -> ServerError:
        said = body[:500].decode(errors="replace")
        return ServerError(f"the server at {self._url} wants another key, give it with --api-key-env: {said}")

    def _send(self, method: str, path: str, body: bytes | None) -> tuple[int, http.client.HTTPMessage, bytes]:
        """On a thread; a kept connection that the server has closed meanwhile is made anew."""
        with suppress(IndexError, ConnectionError, http.client.BadStatusLine):
            return self._exchange(self._idle.pop(), method, path, body)
        return self._exchange(self._connected(), method, path, body)

    def _exchange(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        try:
            connection.request(method, self._base + path, body, self._headers)
            response = connection.getresponse()
            answer = response.status, response.headers, response.read()
        except BaseException:
            connection.close()
            raise
        if response.will_close:
            connection.close()
        else:
            self._idle.append(connection)
        return answer

    def _connected(self) -> http.client.HTTPConnection:
        if self._is_tls:
            context = ssl.create_default_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                self._address, timeout=CONNECT_S, context=context
            )
        else:
            connection = http.client.HTTPConnection(self._address, timeout=CONNECT_S)
        connection.connect()
        assert connection.sock is not None, "it is connected"
        connection.sock.settimeout(ANSWER_S)
        return connection


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
