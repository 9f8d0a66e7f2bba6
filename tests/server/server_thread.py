"""A gRPC server on a free port, with its asyncio loop on a thread, for tests that block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from loraserve.server.grpc.service import GrpcServer

START_TIMEOUT_S = 120.0


class ServerThread:
    """Serves `make_engine()` until the `with` block ends."""

    def __init__(self, make_engine: Callable[[], Any]) -> None:
        self._make_engine = make_engine
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="test-server")
        self.engine: Any = None
        self.address = ""

    async def _serve(self) -> None:
        try:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            self.engine = self._make_engine()
            server = GrpcServer(self.engine, "127.0.0.1", 0)
            await server.start()
            self.address = server.address
        finally:
            self._ready.set()
        await self._stop.wait()
        await server.stop(0.0)

    def __enter__(self) -> ServerThread:
        self._thread.start()
        assert self._ready.wait(START_TIMEOUT_S)
        assert self.address, "the server did not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
