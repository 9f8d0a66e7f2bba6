"""The gRPC front end: the LoraServe service with health and reflection, on one listening port."""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loraserve.errors import EngineStoppedError, LoraserveError
from loraserve.request import Delta
from loraserve.server.errors import ERROR_CLASS_KEY, ListenError, status_code, status_message
from loraserve.server.messages import (
    adapters_to_wire,
    delta_to_wire,
    info_to_wire,
    receipt_to_wire,
    request_from_wire,
)
from loraserve.v1 import loraserve_pb2 as pb
from loraserve.v1 import loraserve_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from loraserve.async_engine import AsyncEngine

    Context: TypeAlias = grpc.aio.ServicerContext[object, object]

logger = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["LoraServe"].full_name
MAX_PORT = 2**16 - 1
FLUSH_SECONDS = 2.0  # for last messages on their way to clients after the engine has stopped

SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share its calls
    ("grpc.max_receive_message_length", 16 * 2**20),  # a prompt of some million tokens
    ("grpc.max_send_message_length", 16 * 2**20),
    ("grpc.keepalive_time_ms", 30_000),  # finds clients that vanished without closing the connection
    ("grpc.keepalive_timeout_ms", 10_000),
)


class LoraServeServicer:
    """Answers the LoraServe service from one engine; reports when that turns out to have stopped."""

    def __init__(self, engine: AsyncEngine, on_engine_stopped: Callable[[], Awaitable[None]]) -> None:
        self._engine = engine
        self._on_engine_stopped = on_engine_stopped

    async def Generate(self, message: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        async with self._errors_answered(context):
            stream = await self._engine.submit(request_from_wire(message))
            call = _CallLog(message)
            try:
                async for delta in stream:
                    call.add(delta)
                    await context.write(delta_to_wire(delta))
            finally:
                # A cancelled call ends here too. Of a finished request, nothing is left to abort.
                stream.abort()
                call.end()

    async def LoadAdapter(  # noqa: N802
        self, message: pb.LoadAdapterRequest, context: Context
    ) -> pb.LoadAdapterResponse | None:
        async with self._errors_answered(context):
            receipt = await self._engine.load_adapter(message.name, message.path)
            logger.info("adapter loaded: name=%s path=%s rank=%d", message.name, message.path, receipt.rank)
            return pb.LoadAdapterResponse(receipt=receipt_to_wire(receipt))
        return None

    async def UnloadAdapter(  # noqa: N802
        self, message: pb.UnloadAdapterRequest, context: Context
    ) -> pb.UnloadAdapterResponse | None:
        async with self._errors_answered(context):
            await self._engine.unload_adapter(message.name)
            logger.info("adapter unloaded: name=%s", message.name)
            return pb.UnloadAdapterResponse()
        return None

    async def ListAdapters(  # noqa: N802
        self, _message: pb.ListAdaptersRequest, context: Context
    ) -> pb.ListAdaptersResponse | None:
        async with self._errors_answered(context):
            return adapters_to_wire(self._engine.adapters())
        return None

    async def GetServerInfo(  # noqa: N802
        self, _message: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse | None:
        async with self._errors_answered(context):
            return info_to_wire(self._engine.info())
        return None

    @asynccontextmanager
    async def _errors_answered(self, context: Context) -> AsyncIterator[None]:
        """Turns an error of the body into the call's status; a cancelled call passes through."""
        try:
            yield
        except LoraserveError as error:
            if isinstance(error, EngineStoppedError):
                await self._on_engine_stopped()
            name, text = type(error).__name__, status_message(error)
            logger.info("call refused: error=%s message=%s", name, text)
            await context.abort(status_code(error), text, ((ERROR_CLASS_KEY, name),))
        except Exception as error:
            logger.exception("call failed")
            text = f"internal error ({type(error).__name__}), the server's log has the details"
            await context.abort(grpc.StatusCode.INTERNAL, text)


class GrpcServer:
    """A listening server over a ready engine; `start` it, then `stop` it once."""

    def __init__(self, engine: AsyncEngine, host: str, port: int) -> None:
        """Binds the port; 0 takes a free one. Raises ListenError if the port can't be had."""
        self._engine = engine
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        servicer = LoraServeServicer(engine, self._health.enter_graceful_shutdown)
        pb_grpc.add_LoraServeServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        services = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(services, self._server)
        self.address = self._bind(host, port)

    def _bind(self, host: str, port: int) -> str:
        check_can_listen(host, port)
        try:
            bound = self._server.add_insecure_port(socket_address(host, port))
        except RuntimeError as error:
            raise ListenError(f"can't listen on {socket_address(host, port)}: {error}") from error
        return socket_address(host, bound)

    async def start(self) -> None:
        """Takes calls from here on; health answers SERVING."""
        await self._health.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()

    async def stop(self, drain_s: float) -> None:
        """Refuses new requests, lets running ones finish within `drain_s`, stops the engine, closes."""
        await self._health.enter_graceful_shutdown()
        await self._engine.shutdown(drain_s)
        await self._server.stop(FLUSH_SECONDS)


def check_can_listen(host: str, port: int) -> None:
    """Raises ListenError, naming the remedy, if `host`:`port` is taken or not ours to bind."""
    if not 0 <= port <= MAX_PORT:
        raise ListenError(f"port {port} is out of range, choose 0 to {MAX_PORT} with --grpc-port")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            text = f"port {port} on {host} is in use, choose another with --grpc-port (0 takes a free one)"
        else:
            text = (
                f"can't listen on {socket_address(host, port)}: {error.strerror}; see --host and --grpc-port"
            )
        raise ListenError(text) from error


def socket_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _CallLog:
    """One line in the log for one Generate call."""

    def __init__(self, message: pb.GenerateRequest) -> None:
        self._adapter = message.adapter or "+".join(sorted(message.adapters)) or "-"
        self._started = time.monotonic()
        self._num_tokens = 0
        self._finish: dict[int, str] = {}

    def add(self, delta: Delta) -> None:
        self._num_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._finish[delta.index] = delta.finish_reason

    def end(self) -> None:
        finish = ",".join(reason for _, reason in sorted(self._finish.items())) or "abandoned"
        milliseconds = 1000 * (time.monotonic() - self._started)
        logger.info(
            "generate: adapter=%s tokens=%d finish=%s ms=%.0f",
            self._adapter,
            self._num_tokens,
            finish,
            milliseconds,
        )
