"""`FailingSource`: an address before a server, which refuses, hangs or answers 503 when it is told to."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import Final, Literal, TypeAlias

Behaviour: TypeAlias = Literal["answers", "refuses", "hangs", "503"]
BUSY: Final = b"HTTP/1.1 503 Slow Down\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
CHUNK_NBYTES: Final = 2**16


class FailingSource:
    """Passes connections on to `port` of this machine, until it behaves otherwise; `url` is its address."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self._behaviour: Behaviour = "answers"
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_listening = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),), daemon=True)
        self._thread.start()
        assert self._is_listening.wait(30.0)
        self.url = f"http://127.0.0.1:{self._port}"

    def behave(self, behaviour: Behaviour) -> None:
        """From now on, for connections that are open as well; what has hung goes on once it answers."""
        asyncio.run_coroutine_threadsafe(self._behave(behaviour), self._loop).result(30.0)

    def close(self) -> None:
        """No connection is left."""
        self._loop.call_soon_threadsafe(self._has_ended.set)
        self._thread.join(30.0)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._has_ended, self._goes_on = asyncio.Event(), asyncio.Event()
        self._goes_on.set()
        self._server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        self._port: int = self._server.sockets[0].getsockname()[1]
        self._is_listening.set()
        await self._has_ended.wait()
        await self._behave("refuses")
        while self._writers:
            await asyncio.sleep(0.01)

    async def _behave(self, behaviour: Behaviour) -> None:
        before, self._behaviour = self._behaviour, behaviour
        if behaviour == "hangs":
            self._goes_on.clear()
        else:
            self._goes_on.set()
        if behaviour in ("refuses", "503"):
            for writer in [*self._writers]:
                writer.transport.abort()
        if behaviour == "refuses":
            self._server.close()
        elif before == "refuses":
            self._server = await asyncio.start_server(self._pass_on, "127.0.0.1", self._port)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with suppress(OSError, EOFError):
            if self._behaviour == "503":
                await reader.readuntil(b"\r\n\r\n")
                writer.write(BUSY)
                await writer.drain()
            else:
                behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", self._behind)
                copies = (self._copy(reader, behind_writer), self._copy(behind_reader, writer))
                await asyncio.gather(*copies, return_exceptions=True)
        writer.close()
        self._writers.discard(writer)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(CHUNK_NBYTES):
                await self._goes_on.wait()
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()
