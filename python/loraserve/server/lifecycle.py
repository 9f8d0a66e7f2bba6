"""A server process from start to exit: load, announce, wait for a signal, drain.

HTTP and gRPC run on one asyncio loop over one engine. On a stop signal both stay open while the engine
drains: running requests finish, and new ones are told that the server is stopping.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from loraserve.engine.workers import Workers
from loraserve.errors import EngineStoppedError
from loraserve.server import assembly
from loraserve.server.grpc.service import FLUSH_SECONDS, GrpcServer
from loraserve.server.listen import check_can_listen
from loraserve.server.observe.logs import log_event
from loraserve.settings.load import LoadedSettings
from loraserve.settings.schema import ServeSettings

if TYPE_CHECKING:
    from loraserve.adapters.startup import AdapterFailure
    from loraserve.async_engine import AsyncEngine
    from loraserve.engine.stats import EngineInfo
    from loraserve.server.adapters.resolver import AdapterResolver
    from loraserve.server.adapters.sources import AdapterSources
    from loraserve.server.adapters.state import AdapterState
    from loraserve.server.adapters.watched import WatchedDirectory
    from loraserve.server.batches.service import BatchService
    from loraserve.server.http.server import HttpServer
    from loraserve.server.http.state import HttpState
    from loraserve.server.observe.tracing import Tracing

logger = logging.getLogger(__name__)

StartEngine: TypeAlias = "Callable[..., Awaitable[tuple[Any, Awaitable[tuple[AdapterFailure, ...]]]]]"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
EXIT_GRACE_S = 1.8  # after the drain, for last messages and the end of a step
UNFINISHED_STATUS = 1
SAME_SIGNAL_S = 0.3


@dataclass(frozen=True)
class Servers:
    """What runs, and how it ends: at least one of the two servers is there."""

    engine: AsyncEngine
    grpc: GrpcServer | None
    http: HttpServer | None
    traces: Tracing | None
    kept: AdapterState | None
    sources: AdapterSources
    resolver: AdapterResolver | None
    watched: WatchedDirectory | None
    batches: BatchService | None = None
    state: HttpState | None = None  # None is without HTTP

    async def start(self) -> None:
        """Takes calls from here on, gRPC first; the ports are bound already."""
        if self.watched is not None:
            await self.watched.start()
        if self.resolver is not None:
            self.resolver.start()
        if self.grpc is not None:
            await self.grpc.start()
        if self.http is not None:
            await self.http.start()
            if self.batches is not None:
                self.batches.start(self.http.app, self.http.app.openapi())
        self.engine.get_ready()
        self.sources.get_ready(self.engine)
        gc.collect()
        gc.freeze()  # libraries and the model: a collection would look at all of it again and again

    async def stop(self, drain_s: float) -> None:
        """Refuses new requests, lets running ones finish within `drain_s`, closes.

        What has not ended by a little later is left behind: the process exits.
        """
        exiting = threading.Timer(drain_s + EXIT_GRACE_S, _leave_unfinished)
        exiting.daemon = True
        exiting.start()
        await self.close(drain_s)
        exiting.cancel()

    async def close(self, drain_s: float) -> None:
        """`stop`, without an end of what does not end."""
        if self.batches is not None:  # which go on after the next start: the drain is for those who wait
            await self.batches.stop()
        if self.watched is not None:
            self.watched.stop()
        await asyncio.gather(self._stop_grpc(drain_s), self._stop_http(drain_s))
        if self.resolver is not None:
            self.resolver.stop()
        closing = Workers("last writes", 2, 2)
        if self.traces is not None:
            await closing.run(self.traces.shutdown)
        if self.kept is not None:
            await closing.run(self.kept.close)

    async def _stop_grpc(self, drain_s: float) -> None:
        if self.grpc is not None:
            await self.grpc.stop(drain_s)

    async def _stop_http(self, drain_s: float) -> None:
        await self.engine.shutdown(drain_s)
        if self.http is not None:
            await self.http.stop(FLUSH_SECONDS)


async def serve(loaded: LoadedSettings) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends the process at once.

    Raises:
        ListenError: a port can't be had; nothing has been loaded yet when it was taken before.
        LoraserveError: a setting is wrong, the model or an adapter can't be loaded, or the engine failed.
    """
    settings = loaded.settings
    if loaded.variables:
        logger.info("settings come from the environment: %s", ", ".join(loaded.variables))
    for note in loaded.notes:
        logger.warning("%s", note)
    _check_ports(settings)
    _exit_on_signals()
    servers = await assemble(settings, _start_engine)
    stop = _stop_event()
    await servers.start()
    facts = start_facts(
        settings, servers.engine.info(), 0 if servers.kept is None else len(servers.kept.restored())
    )
    _tell([_ready_line(settings, servers), *facts])
    failure = await _failure_before(servers.engine, stop)
    if failure is not None:
        await servers.stop(0.0)
        raise EngineStoppedError(failure)
    logger.info("draining: running requests have %g s", settings.drain_seconds)
    await servers.stop(settings.drain_seconds)
    logger.info("stopped")


def _tell(lines: Sequence[str]) -> None:
    """Print the start-up lines; a disk that is full stops no server."""
    try:
        print(*lines, sep="\n", flush=True)
    except OSError as error:
        logger.warning("the start-up lines can't be printed: %s", error.strerror)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_ports(settings: ServeSettings) -> None:
    """Raises ListenError: before anything is loaded, and naming the flag of the port that can't be had."""
    ports = {"--grpc-port": settings.grpc_port, "--http-port": settings.http_port}
    for flag, port in ports.items():
        if port is not None:
            check_can_listen(settings.host, port, flag)


async def assemble(
    settings: ServeSettings, start_engine: StartEngine, *, needs_http: bool = False
) -> Servers:
    """Checks what is cheap to check, then loads the model, then takes the ports.

    Args:
        settings: of the server.
        start_engine: returns the engine, and what loads its adapters and tells which it can't.
        needs_http: have a `state` also where no HTTP port is listened on.
    """
    kept = assembly.adapter_state(settings)
    try:
        return await _assemble_with(settings, kept, start_engine, needs_http)
    except BaseException:
        if kept is not None:
            kept.close()
        raise


async def _assemble_with(
    settings: ServeSettings, kept: AdapterState | None, start_engine: StartEngine, needs_http: bool
) -> Servers:
    access = assembly.access_control(settings, kept)
    tls = assembly.tls_config(settings)
    if tls is not None:
        tls.http_context()
    traces = assembly.tracing(settings)
    metrics = assembly.metrics(settings, traces)
    if kept is not None:
        _log_kept(kept)
    sources = assembly.adapter_sources(settings, access)
    engine, warm_up = await start_engine(settings, kept, sources)
    try:
        failures = await warm_up
        for failure in failures:
            log_event(
                logger,
                "adapter not served",
                level=logging.ERROR,
                adapter=failure.name,
                source=failure.source,
                error=type(failure.error).__name__,
                reason=str(failure.error),
            )
        resolver = assembly.adapter_resolver(settings, engine, sources)
        watched = assembly.watched_directory(settings, engine)
        grpc = assembly.grpc_server(settings, engine, access, sources, metrics, tls, kept, resolver, watched)
        batches = assembly.batch_service(settings, engine, access)
        state = http = None
        if settings.http_port is not None or needs_http:
            state = assembly.http_state(
                settings, engine, access, sources, metrics, failures, kept, batches, resolver, watched
            )
            http = assembly.http_server(settings, state, tls)
    except BaseException:
        await engine.shutdown(0.0)
        raise
    return Servers(engine, grpc, http, traces, kept, sources, resolver, watched, batches, state)


async def _start_engine(
    settings: ServeSettings, kept: AdapterState | None, sources: AdapterSources
) -> tuple[AsyncEngine, Awaitable[tuple[AdapterFailure, ...]]]:
    # Not on a thread that the exit would wait for: a download may hang.
    config = await Workers("settings", 1, 1).run(assembly.engine_config, settings, kept=kept, sources=sources)

    from loraserve.async_engine import AsyncEngine  # noqa: PLC0415 (imports torch: seconds)

    engine = AsyncEngine(config)
    return engine, assembly.warm_up(engine, settings, kept)


def _log_kept(kept: AdapterState) -> None:
    restored = kept.restored()
    log_event(logger, "adapters kept", file=str(kept.path), adapters=", ".join(restored) or None)
    hidden = [name for name in kept.adapters if name not in restored]
    if hidden:
        reason = "the configuration names them, and what that says is loaded"
        names = ", ".join(hidden)
        log_event(logger, "kept adapters not used", level=logging.WARNING, adapters=names, reason=reason)


async def _failure_before(engine: AsyncEngine, stop: asyncio.Event) -> str | None:
    """Why the engine failed, or None once a stop signal has come."""
    failing = asyncio.create_task(engine.wait_failed())
    stopping = asyncio.create_task(stop.wait())
    done, pending = await asyncio.wait({failing, stopping}, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    return failing.result() if failing in done else None


def _ready_line(settings: ServeSettings, servers: Servers) -> str:
    parts = []
    if servers.grpc is not None:
        parts.append(f"grpc {servers.grpc.address}")
    if servers.http is not None:
        scheme = "http" if settings.tls_certificate is None else "https"
        parts.append(f"http {scheme}://{servers.http.address}")
    restored = {} if servers.kept is None else servers.kept.restored()
    names = ", ".join(sorted({*settings.adapters, *restored})) or "none"
    return f"loraserve ready: {', '.join(parts)}, model {settings.model}, adapters {names}"


def start_facts(settings: ServeSettings, info: EngineInfo, num_kept: int = 0) -> list[str]:
    """Lines that say what is served with what, and who may come in."""
    keys = len(settings.keys) + (settings.api_key is not None) + (settings.admin_key is not None)
    if keys or settings.keys_file is not None:
        access = "every request needs one of the configured keys"
    else:
        access = f"no keys: whoever reaches {settings.host} may use everything, this machine administers"
    pool = info.num_pages * info.page_nbytes / 2**20
    step = max(settings.max_batched_tokens, settings.max_prefill_tokens or 0)
    num_ranks = settings.tensor_parallel_size
    of_ranks, each = (f", shared out among {num_ranks} ranks", " in each") if num_ranks > 1 else ("", "")
    return [
        f"  base      {info.base_fingerprint}",
        f"  device    {info.device}, {info.dtype}{of_ranks}",
        f"  weights   {info.weights_nbytes / 2**20:,.0f} MiB, {info.quantization or info.dtype}",
        f"  pool      {pool:,.0f} MiB{each} for KV cache and adapters, kept in {info.adapter_dtype}",
        f"  limits    {info.max_model_len} tokens of context, {settings.max_num_seqs} sequences and "
        f"{step} tokens a step, adapters up to rank {info.max_lora_rank}",
        f"  adapters  {info.num_adapters} of {len(settings.adapters)} configured"
        + (f" and {num_kept} kept from run time" if num_kept else ""),
        f"  access    {access}",
    ]


def _leave_unfinished() -> None:
    names = sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("loraserve"))
    log_event(
        logger,
        "left without an end",
        level=logging.ERROR,
        reason="not everything stopped within the drain",
        threads=", ".join(names) or None,
    )
    logging.shutdown()
    os._exit(UNFINISHED_STATUS)


def leave() -> NoReturn:
    """End the process once `serve` has returned; Python itself would take its modules apart for a second."""
    logging.shutdown()
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(0)


def _exit_on_signals() -> None:
    """While the model loads nothing is running, so a stop signal simply ends the process."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    for number in STOP_SIGNALS:
        signal.signal(number, leave)


def _stop_event() -> asyncio.Event:
    """An event that the first stop signal sets; the second ends the process.

    One that comes at once is the same: some programs signal a process and then its group.
    """
    stop = asyncio.Event()
    first_at = 0.0

    def on_signal(number: signal.Signals) -> None:
        nonlocal first_at
        now = time.monotonic()
        if stop.is_set() and now - first_at < SAME_SIGNAL_S:
            return
        if not stop.is_set():
            first_at = now
        else:
            logger.warning("second %s: leaving without draining", number.name)
            os._exit(128 + number)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    return stop
