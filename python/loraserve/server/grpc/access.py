"""Keys on gRPC: the same checks as on HTTP, before a call reaches the service.

Metadata carries `authorization: Bearer KEY`. Health and reflection need no key. Of the service, what `_RULES`
does not name needs an administrator, so that a new method is never open by accident.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError

from loraserve.errors import InvalidRequestError, LoraserveError
from loraserve.server.access.disclosure import (
    shown_adapter_message,
    shown_generations_message,
    shown_info_message,
)
from loraserve.server.access.keys import PROXY_HEADERS, AccessControl, Caller
from loraserve.server.grpc.message_bounds import counter
from loraserve.v1 import loraserve_pb2 as pb
from loraserve.validation.printable import printable
from loraserve.wire.errors import error_metadata, status_code, status_message

if TYPE_CHECKING:
    Context: TypeAlias = grpc.aio.ServicerContext[object, object]

_SERVICE = pb.DESCRIPTOR.services_by_name["LoraServe"]
SERVICE_PREFIX = f"/{_SERVICE.full_name}/"

MAX_REASON_CHARS = 500

logger = logging.getLogger(__name__)

_CALLER: ContextVar[Caller] = ContextVar("caller")  # of the call this task answers

Handler: TypeAlias = Callable[[Any, Any], Awaitable[Any]]
Rule: TypeAlias = "Callable[[AccessInterceptor, Handler, Any, Context, Caller], Awaitable[Any]]"


class AccessInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Authenticates every call of the LoraServe service and checks what it asks for.

    Args:
        access: who may do what.
    """

    def __init__(self, access: AccessControl) -> None:
        self._access = access
        self._check_counts = {
            name: counter(method.input_type) for name, method in _SERVICE.methods_by_name.items()
        }

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Called by gRPC for each call; what it returns checks the caller before the method runs."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(SERVICE_PREFIX):
            return handler
        name = method.removeprefix(SERVICE_PREFIX)
        rule = _RULES.get(name, AccessInterceptor._administer)
        parse = partial(_parse, handler.request_deserializer, self._check_counts[name])
        # Bytes come here as they are: of those that are no message gRPC makes UNKNOWN and a traceback.
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(
                self._checked(handler.stream_unary, partial(_parsed, parse), rule),
                response_serializer=handler.response_serializer,
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._checked(handler.unary_stream, parse, rule),
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._checked(handler.unary_unary, parse, rule),
            response_serializer=handler.response_serializer,
        )

    def _checked(self, handler: Handler, parse: Callable[[Any], Any], rule: Rule) -> Handler:
        async def handle(data: Any, context: Context) -> Any:
            try:
                caller = self._access.authenticate(
                    metadata_value(context, "authorization"), client_host=_client_host(context)
                )
                message = parse(data)
            except LoraserveError as error:
                await abort_with(context, error)
            _CALLER.set(caller)
            return await rule(self, handler, message, context, caller)

        return handle

    async def _generate(self, handler: Handler, message: Any, context: Context, _: Caller) -> None:
        await handler(message, context)  # what is asked for is checked where every request is run

    async def _pool(self, handler: Handler, message: Any, context: Context, _: Caller) -> Any:
        return await handler(message, context)  # as of `_generate`

    async def _list(self, handler: Handler, message: Any, context: Context, caller: Caller) -> Any:
        response = await handler(message, context)
        if response is None:
            return None
        usable = [adapter for adapter in response.adapters if caller.may_use(adapter.name)]
        return pb.ListAdaptersResponse(
            adapters=[shown_adapter_message(adapter, caller) for adapter in usable]
        )

    async def _generations(self, handler: Handler, message: Any, context: Context, caller: Caller) -> Any:
        try:
            caller.check_use(message.name)
        except LoraserveError as error:
            await abort_with(context, error)
        response = await handler(message, context)
        return None if response is None else shown_generations_message(response, caller)

    async def _info(self, handler: Handler, message: Any, context: Context, caller: Caller) -> Any:
        response = await handler(message, context)
        return None if response is None else shown_info_message(response, caller)

    async def _administer(self, handler: Handler, message: Any, context: Context, caller: Caller) -> Any:
        try:
            caller.require_admin()
        except LoraserveError as error:
            await abort_with(context, error)
        return await handler(message, context)


_RULES: dict[str, Rule] = {
    "Generate": AccessInterceptor._generate,
    "Embed": AccessInterceptor._pool,
    "Classify": AccessInterceptor._pool,
    "Score": AccessInterceptor._pool,
    "ListAdapters": AccessInterceptor._list,
    "ListGenerations": AccessInterceptor._generations,
    "GetServerInfo": AccessInterceptor._info,
}


def _parse(deserialize: Callable[[bytes], Any], check_counts: Callable[[bytes], None], data: bytes) -> Any:
    """Raises InvalidRequestError: the bytes are no such message, or hold too many values."""
    check_counts(data)
    try:
        return deserialize(data)
    except (DecodeError, ValueError) as error:  # ValueError: text that is not UTF-8
        logger.info("call refused: %d bytes that are no message", len(data))
        text = f"the request's {len(data)} bytes are no message of this method: {error}"
        raise InvalidRequestError(printable(text, MAX_REASON_CHARS)) from None


async def _parsed(parse: Callable[[bytes], Any], messages: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    """Each of a stream's messages; raises as `_parse`, where the method asks for it."""
    async for data in messages:
        yield parse(data)


async def abort_with(context: Context, error: LoraserveError) -> None:
    """Ends the call with the error's status and text, and the rest of it in the trailing metadata."""
    await context.abort(status_code(error), status_message(error), error_metadata(error))


def current_caller() -> Caller:
    """Whose call this task answers."""
    return _CALLER.get()


def host_of_peer(peer: str) -> str:
    """The IP address of "ipv4:1.2.3.4:5" or "ipv6:[::1]:5", the bracket written as %5B; else ""."""
    kind, _, address = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ""
    return unquote(address).rpartition(":")[0].strip("[]")


def _client_host(context: Context) -> str:
    """The caller's address; "" behind a proxy, which is not the caller."""
    if any(metadata_value(context, name) is not None for name in PROXY_HEADERS):
        return ""
    return host_of_peer(context.peer())


def metadata_value(context: Context, name: str) -> str | None:
    """The first value of this name that the client sent; None if there is none."""
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return None
