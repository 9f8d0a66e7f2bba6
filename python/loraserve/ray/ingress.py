"""`Ingress`: the HTTP application and the gRPC service as they are, over all replicas, as a Serve deployment.

There is one: keys, limits, quotas, responses and batches are its own, and so hold for the fleet.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from loraserve.adapters.startup import AdapterFailure, StartingAdapters
from loraserve.ray.engine import FleetEngine
from loraserve.server import assembly
from loraserve.server.adapters.sources import AdapterSources
from loraserve.server.adapters.state import AdapterState
from loraserve.server.http.app import create_app
from loraserve.server.lifecycle import Servers, assemble
from loraserve.server.observe.logs import configure_logs
from loraserve.settings.schema import ServeSettings


@serve.ingress()
class Ingress:
    """Answers Serve's HTTP proxy, and on ports of its own where the settings say so."""

    async def __init__(  # type: ignore[misc]
        self, settings: ServeSettings, engines: DeploymentHandle[Any]
    ) -> None:
        """Returns once a replica is ready.

        Raises LoraserveError: a setting is wrong, a port can't be had, or an adapter can't be loaded.
        """
        configure_logs(settings.log_level, settings.log_format)
        self._settings = settings
        self._engines = engines
        self._servers: Servers = await assemble(settings, self._start_engine, needs_http=True)
        assert self._servers.state is not None, "invariant: `assemble` makes one"
        self._servers.state.more_series = self._engine.replica_series
        await self._servers.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        assert self._servers.state is not None, "invariant: `assemble` makes one"
        return create_app(self._servers.state)

    async def _start_engine(
        self, settings: ServeSettings, kept: AdapterState | None, sources: AdapterSources
    ) -> tuple[FleetEngine, Awaitable[tuple[AdapterFailure, ...]]]:
        engine = FleetEngine(self._engines)
        await engine.start()
        self._engine = engine
        return engine, _load_kept(engine, settings, kept, sources)

    async def addresses(self) -> dict[str, str]:
        """Where it listens by itself: "http" and "grpc" to host:port."""
        servers = {"http": self._servers.http, "grpc": self._servers.grpc}
        return {name: server.address for name, server in servers.items() if server is not None}

    async def stop(self, drain_s: float) -> None:
        """Refuse new requests, let running ones finish within `drain_s`, close."""
        await self._servers.close(drain_s)

    async def facts(self) -> list[str]:
        """Lines that say what is served."""
        info = self._servers.engine.info()
        return [f"  base      {info.base_fingerprint}", f"  device    {info.device}, {info.dtype}"]


async def _load_kept(
    engine: FleetEngine, settings: ServeSettings, kept: AdapterState | None, sources: AdapterSources
) -> tuple[AdapterFailure, ...]:
    """What run time added before the last start, into all replicas, and what replicas started without.

    Raises LoraserveError: it can't be loaded, and that is to fail the start.
    """
    starting = StartingAdapters(engine.adapter_failures)
    for name, adapter in ({} if kept is None else kept.restored()).items():
        with starting.trying(name, str(adapter.adapter_source())):
            path = str(await sources.resolve(adapter.adapter_source(), None, lambda *_: None))
            await engine.load_adapter(name, path, assembly.adapter_manifest(name, adapter), replace=True)
            if adapter.pin:
                await engine.pin_adapter(name, True)
    starting.check(settings.on_adapter_error)
    return tuple(starting.failures)
