"""The gRPC front end: the LoraServe service with health and reflection, on one listening port."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loraserve.adapters.source import AdapterSource, parse_source
from loraserve.errors import EngineStoppedError, LoraserveError
from loraserve.remote.location import is_remote
from loraserve.server.access.keys import AccessControl
from loraserve.server.access.request_limits import RequestLimits
from loraserve.server.adapters.loading import (
    LoadRequest,
    load_adapter,
    pin_adapter,
    roll_back_adapter,
    shadow_adapter,
    split_adapter,
    unload_adapter,
    warm_adapter,
)
from loraserve.server.adapters.sources import AdapterSources
from loraserve.server.grpc.access import (
    AccessInterceptor,
    abort_with,
    current_caller,
    metadata_value,
)
from loraserve.server.grpc.pooling import PooledAnswers
from loraserve.server.grpc.upload import upload_data, upload_head
from loraserve.server.listen import ListenError, check_can_listen, socket_address
from loraserve.server.observe.logs import log_event
from loraserve.server.observe.metrics import Metrics
from loraserve.server.request_run import CallOrigin, RequestRunner
from loraserve.v1 import loraserve_pb2 as pb
from loraserve.v1 import loraserve_pb2_grpc as pb_grpc
from loraserve.wire.errors import status_message
from loraserve.wire.messages import (
    adapters_to_wire,
    check_known,
    delta_to_wire,
    generations_to_wire,
    info_to_wire,
    receipt_to_wire,
    request_from_wire,
)

if TYPE_CHECKING:
    from loraserve._core import Receipt
    from loraserve.async_engine import AsyncEngine
    from loraserve.server.access.fair_shares import FairShares
    from loraserve.server.adapters.resolver import AdapterResolver
    from loraserve.server.adapters.state import AdapterState
    from loraserve.server.adapters.watched import WatchedDirectory

    Context: TypeAlias = grpc.aio.ServicerContext[object, object]

logger = logging.getLogger(__name__)

GRPC_ROUTE = "grpc"  # what metrics call Generate
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["LoraServe"].full_name
MAX_MESSAGE_NBYTES = 16 * 2**20  # a prompt of some million tokens
FLUSH_SECONDS = 1.0  # for last messages on their way to clients after the engine has stopped

SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share its calls
    ("grpc.max_send_message_length", 16 * 2**20),
    ("grpc.keepalive_time_ms", 30_000),  # finds clients that vanished without closing the connection
    ("grpc.keepalive_timeout_ms", 10_000),
)


class LoraServeServicer:
    """Answers the LoraServe service from one engine; reports when that turns out to have stopped.

    A typed error ends the call with its status and text (`wire.errors`), any other with INTERNAL.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        runner: RequestRunner,
        on_engine_stopped: Callable[[], Awaitable[None]],
        sources: AdapterSources | None,
        kept: AdapterState | None = None,
        shares: FairShares | None = None,
    ) -> None:
        self._shares = shares
        self._engine = engine
        self._sources = sources
        self._kept = kept
        self._runner = runner
        self._pooled = PooledAnswers(runner)
        self._on_engine_stopped = on_engine_stopped

    async def Generate(self, message: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        """Write a message per delta; a cancelled call aborts its request."""
        async with self._errors_answered(context, message):
            origin = _origin(GRPC_ROUTE, context)
            try:
                request = request_from_wire(message)
            except LoraserveError:
                self._runner.refused(message.adapter or dict(message.adapters) or None, origin)
                raise
            # A cancelled call leaves the blocks as well.
            async with self._runner.run([request], origin) as run, aclosing(run.deltas()) as deltas:  # type: ignore[type-var]
                async for _, delta in deltas:
                    if delta.finish_reason is not None:
                        delta.generations = run.generations
                    await context.write(delta_to_wire(delta))

    async def Embed(  # noqa: N802
        self, message: pb.EmbedRequest, context: Context
    ) -> pb.EmbedResponse | None:
        """Vectors of the prompts; a cancelled call aborts them."""
        async with self._errors_answered(context, message):
            return await self._pooled.embed(message, _origin("grpc_embed", context))
        return None

    async def Classify(  # noqa: N802
        self, message: pb.ClassifyRequest, context: Context
    ) -> pb.ClassifyResponse | None:
        """Labels of the prompts; a cancelled call aborts them."""
        async with self._errors_answered(context, message):
            return await self._pooled.classify(message, _origin("grpc_classify", context))
        return None

    async def Score(  # noqa: N802
        self, message: pb.ScoreRequest, context: Context
    ) -> pb.ScoreResponse | None:
        """Scores of pairs of texts; a cancelled call aborts them."""
        async with self._errors_answered(context, message):
            return await self._pooled.score(message, _origin("grpc_score", context))
        return None

    async def LoadAdapter(  # noqa: N802
        self, message: pb.LoadAdapterRequest, context: Context
    ) -> pb.LoadAdapterResponse | None:
        """Register a directory of this machine, and answer with the receipt."""
        async with self._errors_answered(context, message):
            source = AdapterSource("local", message.path)
            if is_remote(message.path):
                source = parse_source(message.path)
            wanted = LoadRequest(
                name=message.name,
                source=source,
                replaces=message.replace,
                expected_generation=_expected(message),
                share=message.share if message.HasField("share") else None,
                shadow=message.shadow if message.HasField("shadow") else None,
                weight=message.weight if message.HasField("weight") else None,
            )
            receipt = await self._load(self._sources, wanted)
            return pb.LoadAdapterResponse(receipt=receipt_to_wire(receipt))
        return None

    async def UploadAdapter(  # noqa: N802
        self, messages: AsyncIterator[pb.UploadAdapterRequest], context: Context
    ) -> pb.LoadAdapterResponse | None:
        """Register the adapter that is sent, and answer with the receipt."""
        async with self._errors_answered(context, None):
            head = await upload_head(messages)
            stored = await self._engine.receive_adapter(head.name, head.config_json, upload_data(messages))
            source = AdapterSource("memory", stored.source)
            wanted = LoadRequest(
                name=head.name,
                source=source,
                replaces=head.replace,
                expected_generation=_expected(head),
                share=head.share if head.HasField("share") else None,
                shadow=head.shadow if head.HasField("shadow") else None,
                weight=head.weight if head.HasField("weight") else None,
                stored=stored,
            )
            receipt = await self._load(None, wanted)
            return pb.LoadAdapterResponse(receipt=receipt_to_wire(receipt))
        return None

    async def UnloadAdapter(  # noqa: N802
        self, message: pb.UnloadAdapterRequest, context: Context
    ) -> pb.UnloadAdapterResponse | None:
        """Refuse new requests for an adapter; running ones finish."""
        async with self._errors_answered(context, message):
            by = current_caller().name
            await unload_adapter(self._engine, message.name, by=by, kept=self._kept, shares=self._shares)
            return pb.UnloadAdapterResponse()
        return None

    async def WarmAdapter(  # noqa: N802
        self, message: pb.WarmAdapterRequest, context: Context
    ) -> pb.WarmAdapterResponse | None:
        """Load an adapter into the pool; the answer comes when it is there, with the seconds it took."""
        async with self._errors_answered(context, message):
            load_s = await warm_adapter(self._engine, message.name, by=current_caller().name)
            return pb.WarmAdapterResponse(load_s=load_s)
        return None

    async def PinAdapter(  # noqa: N802
        self, message: pb.PinAdapterRequest, context: Context
    ) -> pb.PinAdapterResponse | None:
        """Keep an adapter in the pool, or let it be evicted again."""
        async with self._errors_answered(context, message):
            await pin_adapter(
                self._engine, message.name, message.is_pinned, by=current_caller().name, kept=self._kept
            )
            return pb.PinAdapterResponse()
        return None

    async def SplitAdapter(  # noqa: N802
        self, message: pb.SplitAdapterRequest, context: Context
    ) -> pb.SplitAdapterResponse | None:
        """Let generations share an adapter's requests."""
        async with self._errors_answered(context, message):
            shares, by = dict(message.shares), current_caller().name
            await split_adapter(self._engine, message.name, shares, by=by, kept=self._kept)
            return pb.SplitAdapterResponse()
        return None

    async def ShadowAdapter(  # noqa: N802
        self, message: pb.ShadowAdapterRequest, context: Context
    ) -> pb.ShadowAdapterResponse | None:
        """Copy requests of an adapter to a generation, or no longer."""
        async with self._errors_answered(context, message):
            generation = message.generation if message.HasField("generation") else None
            by = current_caller().name
            await shadow_adapter(
                self._engine, message.name, generation, message.fraction, by=by, kept=self._kept
            )
            return pb.ShadowAdapterResponse()
        return None

    async def RollBackAdapter(  # noqa: N802
        self, message: pb.RollBackAdapterRequest, context: Context
    ) -> pb.RollBackAdapterResponse | None:
        """Go back to an earlier generation, from the next request on."""
        async with self._errors_answered(context, message):
            number = await roll_back_adapter(
                self._engine,
                message.name,
                message.generation if message.HasField("generation") else None,
                expected_generation=_expected(message),
                by=current_caller().name,
                kept=self._kept,
            )
            return pb.RollBackAdapterResponse(generation=number)
        return None

    async def ListGenerations(  # noqa: N802
        self, message: pb.ListGenerationsRequest, context: Context
    ) -> pb.ListGenerationsResponse | None:
        """All that is remembered; `AccessInterceptor` leaves out what the caller may not see."""
        async with self._errors_answered(context, message):
            return generations_to_wire(self._engine.generations(message.name))
        return None

    async def ListAdapters(  # noqa: N802
        self, message: pb.ListAdaptersRequest, context: Context
    ) -> pb.ListAdaptersResponse | None:
        """All adapters, by name; `AccessInterceptor` leaves out what the caller may not see."""
        async with self._errors_answered(context, message):
            return adapters_to_wire(self._engine.adapters())
        return None

    async def GetServerInfo(  # noqa: N802
        self, message: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse | None:
        """Settings and present load; `AccessInterceptor` leaves out what the caller may not see."""
        async with self._errors_answered(context, message):
            return info_to_wire(self._engine.info())
        return None

    async def _load(self, sources: AdapterSources | None, wanted: LoadRequest) -> Receipt:
        return await load_adapter(
            self._engine,
            sources,
            wanted,
            lambda _: None,
            by=current_caller().name,
            kept=self._kept,
            shares=self._shares,
        )

    @asynccontextmanager
    async def _errors_answered(self, context: Context, message: Message | None) -> AsyncIterator[None]:
        """Turns an error of the body into the call's status; a cancelled call passes through."""
        try:
            if message is not None:
                check_known(message)
            yield
        except LoraserveError as error:
            if isinstance(error, EngineStoppedError):
                await self._on_engine_stopped()
            name, text = type(error).__name__, status_message(error)
            log_event(logger, "call refused", error=name, reason=text, key=current_caller().name)
            await abort_with(context, error)
        except Exception as error:
            logger.exception("call failed")
            text = f"internal error ({type(error).__name__}), the server's log has the details"
            await context.abort(grpc.StatusCode.INTERNAL, text)


def _expected(
    message: pb.LoadAdapterRequest | pb.UploadAdapterHead | pb.RollBackAdapterRequest,
) -> int | None:
    return message.expected_generation if message.HasField("expected_generation") else None


def _origin(route: str, context: Context) -> CallOrigin:
    return CallOrigin(
        caller=current_caller(), route=route, traceparent=metadata_value(context, "traceparent")
    )


class GrpcServer:
    """A listening server over a ready engine; `start` it, then `stop` it once."""

    def __init__(
        self,
        engine: AsyncEngine,
        host: str,
        port: int,
        *,
        access: AccessControl | None = None,
        sources: AdapterSources | None = None,
        metrics: Metrics | None = None,
        credentials: grpc.ServerCredentials | None = None,
        limits: RequestLimits | None = None,
        max_message_nbytes: int = MAX_MESSAGE_NBYTES,
        kept: AdapterState | None = None,
        resolver: AdapterResolver | None = None,
        watched: WatchedDirectory | None = None,
    ) -> None:
        """Binds the port; 0 takes a free one. Raises ListenError if the port can't be had.

        Args:
            engine: what answers; `stop` shuts it down.
            host: address to listen on.
            port: TCP port.
            access: who may do what; None knows no keys.
            sources: where adapters may be loaded from; None lets them come from everywhere.
            metrics: told of every request.
            credentials: TLS; None serves plain text.
            limits: what one request may ask; None takes the defaults.
            max_message_nbytes: of a request's message; a larger one is refused with RESOURCE_EXHAUSTED.
            kept: where changes of adapters are kept for the next start; None forgets them.
            resolver: fetches adapters that requests name; None fetches none.
            watched: brings those of a directory; None where none is watched.
        """
        self._engine = engine
        self._credentials = credentials
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        access = access or AccessControl.open()
        interceptors = (AccessInterceptor(access),)
        options = (*SERVER_OPTIONS, ("grpc.max_receive_message_length", max_message_nbytes))
        self._server = grpc.aio.server(interceptors=interceptors, options=options)
        stop_serving = self._health.enter_graceful_shutdown
        runner = RequestRunner(engine, metrics or Metrics(), limits or RequestLimits(), resolver, watched)
        servicer = LoraServeServicer(engine, runner, stop_serving, sources, kept, access.shares)
        pb_grpc.add_LoraServeServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        services = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(services, self._server)
        self.address = self._bind(host, port)

    def _bind(self, host: str, port: int) -> str:
        check_can_listen(host, port, "--grpc-port")  # its errors say more than those of gRPC
        try:
            if self._credentials is None:
                bound = self._server.add_insecure_port(socket_address(host, port))
            else:
                bound = self._server.add_secure_port(socket_address(host, port), self._credentials)
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
