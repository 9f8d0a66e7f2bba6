"""A listening HTTP server on the running asyncio loop, beside whatever else runs there."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import Message

from loraserve.server.http.app import create_app
from loraserve.server.http.protocol import bounded_protocol
from loraserve.server.http.state import HttpState
from loraserve.server.listen import bound_socket, socket_address

BACKLOG = 2048
START_POLL_S = 0.005


class HttpServer:
    """Serves `state`; `start` it, then `stop` it once. The engine is its owner's to shut down."""

    def __init__(self, state: HttpState, host: str, port: int, *, tls: ssl.SSLContext | None = None) -> None:
        """Binds the port; 0 takes a free one. Raises ListenError if the port can't be had."""
        self._socket = bound_socket(host, port, "--http-port", BACKLOG)
        self.address = socket_address(host, self._socket.getsockname()[1])
        self.app = create_app(state)
        config = uvicorn.Config(
            self.app,
            http=bounded_protocol(state.limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=int(state.limits.keep_alive_s),
        )
        config.load()
        config.ssl = tls
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Takes connections from here on."""
        await _build_routes(self._server.config.app)
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._serving.done():
                await self._serving
            await asyncio.sleep(START_POLL_S)

    async def stop(self, drain_s: float) -> None:
        """Takes no new connections, lets running requests finish for `drain_s`, closes the rest."""
        if self._serving is None:
            self._socket.close()
            return
        self._server.config.timeout_graceful_shutdown = max(1, int(drain_s))
        self._server.should_exit = True
        await self._serving


async def _build_routes(app: Any) -> None:
    """FastAPI makes the validators of all routes at its first request: a tenth of a second on the loop."""

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None: ...

    scope = {"type": "http", "method": "GET", "path": "/-", "headers": [], "query_string": b""}
    await app(scope, receive, send)


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: the process has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
