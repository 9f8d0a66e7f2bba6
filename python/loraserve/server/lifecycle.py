"""A server process from start to exit: load, announce, wait for a signal, drain."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from loraserve.config import EngineConfig
from loraserve.errors import EngineStoppedError
from loraserve.server.grpc import GrpcServer, check_can_listen

if TYPE_CHECKING:
    from loraserve.async_engine import AsyncEngine

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where a server listens and how long it drains.

    Args:
        engine: what it serves.
        host: address to listen on.
        grpc_port: TCP port; 0 takes a free one.
        drain_s: seconds that running requests get to finish after a stop signal.
    """

    engine: EngineConfig
    host: str = "127.0.0.1"
    grpc_port: int = 50051
    drain_s: float = 30.0


async def serve(config: ServeConfig) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends the process at once.

    Raises:
        ListenError: the port can't be had; nothing has been loaded yet when it was taken before.
        LoraserveError: the model or an adapter can't be loaded, or the engine failed.
    """
    check_can_listen(config.host, config.grpc_port)
    _exit_on_signals()

    from loraserve.async_engine import AsyncEngine  # noqa: PLC0415 (imports torch: seconds)

    engine = AsyncEngine(config.engine)
    try:
        server = GrpcServer(engine, config.host, config.grpc_port)
    except BaseException:
        await engine.shutdown(0.0)
        raise
    stop = _stop_event()
    await server.start()
    print(_ready_line(config, server.address), flush=True)
    failure = await _failure_before(engine, stop)
    if failure is not None:
        await server.stop(0.0)
        raise EngineStoppedError(failure)
    logger.info("draining: running requests have %g s", config.drain_s)
    await server.stop(config.drain_s)
    logger.info("stopped")


async def _failure_before(engine: AsyncEngine, stop: asyncio.Event) -> str | None:
    """Why the engine failed, or None once a stop signal has come."""
    failing = asyncio.create_task(engine.wait_failed())
    stopping = asyncio.create_task(stop.wait())
    done, pending = await asyncio.wait({failing, stopping}, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    return failing.result() if failing in done else None


def _ready_line(config: ServeConfig, address: str) -> str:
    names = ", ".join(sorted(config.engine.adapters)) or "none"
    return f"loraserve ready: grpc {address}, model {config.engine.model}, adapters {names}"


def _exit_on_signals() -> None:
    """While the model loads nothing is running, so a stop signal simply ends the process."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    for number in STOP_SIGNALS:
        signal.signal(number, leave)


def _stop_event() -> asyncio.Event:
    """An event that the first stop signal sets; the second signal ends the process."""
    stop = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            logger.warning("second %s: leaving without draining", number.name)
            os._exit(128 + number)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    return stop
