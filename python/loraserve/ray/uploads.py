"""Adapters that clients send: files below a directory that all replicas can read."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from loraserve.adapters.stored import config_text, memory_source
from loraserve.engine.workers import Workers
from loraserve.errors import CapacityError

MAX_NBYTES = 2 * 2**30  # of one adapter, as in one server
MAX_ALL_NBYTES = 8 * 2**30
WRITE_NBYTES = 2**20


@dataclass(frozen=True)
class UploadedAdapter:
    """A PEFT directory that was sent; `source` is what a server says it came from."""

    source: str
    path: str

    def discard(self) -> None:
        """It is not served."""
        shutil.rmtree(self.path, ignore_errors=True)


class Uploads:
    """Below a directory of `TMPDIR`, gone with `close`."""

    def __init__(self) -> None:
        self._directory: Path | None = None
        self._writers = Workers("writes of adapters", 4, 256)

    async def receive(self, name: str, config: str, chunks: AsyncIterator[bytes]) -> UploadedAdapter:
        """A directory with a config and the bytes of a safetensors file, as they come.

        Raises CapacityError: it is too large, or there is no room.
        """
        text = config_text(config)
        path = await self._writers.run(self._make, name, text)
        adapter = UploadedAdapter(memory_source(name), str(path))
        try:
            await self._write(path / "adapter_model.safetensors", chunks)
        except BaseException:
            adapter.discard()
            raise
        return adapter

    def close(self) -> None:
        """Nothing of it is served any more."""
        self._writers.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _make(self, name: str, config: str) -> Path:
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="loraserve-uploads-"))
        if sum(file.stat().st_size for file in self._directory.glob("*/*")) > MAX_ALL_NBYTES - MAX_NBYTES:
            raise CapacityError(
                f"adapters that were sent take {MAX_ALL_NBYTES} bytes together at most: load from a path"
            )
        path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._directory))
        path.chmod(0o755)
        (path / "adapter_config.json").write_text(config)
        return path

    async def _write(self, path: Path, chunks: AsyncIterator[bytes]) -> None:
        waiting, num_bytes = bytearray(), 0
        with path.open("wb") as file:
            async for chunk in chunks:
                waiting += chunk
                num_bytes += len(chunk)
                if num_bytes > MAX_NBYTES:
                    raise CapacityError(f"an adapter that is sent has at most {MAX_NBYTES} bytes")
                if len(waiting) >= WRITE_NBYTES:
                    await self._writers.run(_write, file, bytes(waiting))
                    waiting.clear()
            await self._writers.run(_write, file, bytes(waiting))


def _write(file: IO[bytes], content: bytes) -> None:
    try:
        file.write(content)
    except OSError as error:
        raise CapacityError(f"an adapter that is sent can't be written: {error.strerror}") from error
