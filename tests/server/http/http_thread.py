"""HTTP and gRPC over one engine on free ports, their asyncio loop on a thread, for tests that block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from loraserve.server.access.keys import AccessControl
from loraserve.server.adapters.resolver import AdapterResolver
from loraserve.server.adapters.sources import AdapterSources
from loraserve.server.batches.service import batch_service
from loraserve.server.batches.store import BatchStore
from loraserve.server.grpc.service import GrpcServer
from loraserve.server.http.responses.store import StoreLimits
from loraserve.server.http.server import HttpServer
from loraserve.server.http.state import HttpLimits, HttpState
from loraserve.server.observe.metrics import Metrics
from loraserve.settings.entries import ApiKey

START_TIMEOUT_S = 120.0


class HttpThread:
    """Serves `make_engine()` until the `with` block ends."""

    def __init__(
        self,
        make_engine: Callable[[], Any],
        *,
        served_names: tuple[str, ...] = ("base",),
        keys: Sequence[ApiKey] = (),
        limits: HttpLimits | None = None,
        max_concurrent_requests: int | None = None,
        adapters_at_start: tuple[str, ...] = (),
        adapter_roots: Sequence[Path] = (),
        resolver: AdapterResolver | None = None,
        batch_dir: Path | None = None,
        batch_dir_nbytes: int = 2**30,
        batch_max_num_seqs: int = 4,
        response_limits: StoreLimits | None = None,
    ) -> None:
        self._make_engine = make_engine
        self._served_names = served_names
        self._access = AccessControl(keys, max_concurrent_requests=max_concurrent_requests)
        self._limits = limits or HttpLimits()
        self._adapters_at_start = adapters_at_start
        self.metrics = Metrics()
        self._adapter_roots = adapter_roots
        self._resolver = resolver
        self._batch_dir = batch_dir
        self._batch_dir_nbytes, self._batch_max_num_seqs = batch_dir_nbytes, batch_max_num_seqs
        self._response_limits = response_limits or StoreLimits()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="test-http")
        self.engine: Any = None
        self.address = ""
        self.grpc_address = ""

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    async def _serve(self) -> None:
        try:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            self.engine = self._make_engine()
            batches = None
            if self._batch_dir is not None:
                store = BatchStore(self._batch_dir, self._batch_dir_nbytes)
                waiting = self.engine.num_waiting
                batches = batch_service(store, self._access, self._batch_max_num_seqs, waiting)
            self.batches = batches
            state = HttpState(
                engine=self.engine,
                served_names=self._served_names,
                access=self._access,
                metrics=self.metrics,
                limits=self._limits,
                adapters_at_start=self._adapters_at_start,
                sources=AdapterSources(roots=self._adapter_roots, hub_repos=()),
                resolver=self._resolver,
                batches=batches,
                response_limits=self._response_limits,
            )
            http = HttpServer(state, "127.0.0.1", 0)
            grpc = GrpcServer(
                self.engine,
                "127.0.0.1",
                0,
                access=self._access,
                metrics=self.metrics,
                limits=self._limits,
                max_message_nbytes=self._limits.max_body_nbytes,
            )
            await http.start()
            await grpc.start()
            if batches is not None:
                batches.start(http.app, http.app.openapi())
            self.address, self.grpc_address = http.address, grpc.address
        finally:
            self._ready.set()
        await self._stop.wait()
        if batches is not None:
            await batches.stop()
        await grpc.stop(0.0)
        await http.stop(0.0)

    def __enter__(self) -> HttpThread:
        self._thread.start()
        assert self._ready.wait(START_TIMEOUT_S)
        assert self.address, "the server did not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
