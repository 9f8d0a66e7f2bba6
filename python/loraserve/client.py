"""Clients of a loraserve server, blocking and asyncio; they raise the errors of loraserve.errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraserve.errors import EngineStoppedError, LoraserveError
from loraserve.request import AdapterSpec, ChatOptions, Completion, Delta, GenerateRequest
from loraserve.sampling_params import SamplingParams
from loraserve.tools.tool import Tool, ToolOptions
from loraserve.v1 import loraserve_pb2 as pb
from loraserve.v1 import loraserve_pb2_grpc as pb_grpc
from loraserve.wire.adapter_calls import AdapterCalls, AsyncAdapterCalls
from loraserve.wire.errors import typed_error
from loraserve.wire.messages import delta_from_wire, request_to_wire
from loraserve.wire.pooled_calls import AsyncPooledCalls, PooledCalls

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_ADDRESS = "127.0.0.1:50051"
READY_POLL_S = 0.1

_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", 16 * 2**20),
    ("grpc.max_receive_message_length", 16 * 2**20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class RequestFields(TypedDict, total=False):
    """What a request says beside its prompt and its sampling; each may be left out.

    Args:
        messages: a chat, each message with "role" and "content"; in place of the prompt.
        chat: how the chat becomes a prompt; None leaves it to the template.
        tools: functions that the answer may call, in OpenAI's form.
        tool_choice: "none", "auto", "required", or OpenAI's object that names a function, or several.
        parallel_tool_calls: False allows one call an answer.
        thinking_token_budget: most tokens of reasoning, after which its end is forced.
        adapter: None for the base model, a name, or {name: weight}.
        deadline_s: seconds the server has to finish it, else DeadlineError.
        truncate: keep only this many tokens of the prompt, its last.
        cache_salt: up to 256 characters; only requests of the same salt share cached prompts.
        suffix: what stands behind the answer, where the model fills in the middle.
        user: whose request it is, so that adapters with shares give it the same generation.
    """

    messages: Sequence[Mapping[str, Any]] | None
    chat: ChatOptions | None
    tools: Sequence[Mapping[str, Any] | Tool] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    thinking_token_budget: int | None
    adapter: AdapterSpec
    deadline_s: float | None
    truncate: int | None
    cache_salt: str | None
    suffix: str | None
    user: str | None


class Client(PooledCalls, AdapterCalls):
    """A blocking connection to one server; may be shared between threads.

    Every call raises the server's typed error, EngineStoppedError when no server answers, and
    TimeoutError after `timeout` seconds.

    Args:
        address: host:port of the server.
        timeout: seconds a call may take in all; None waits as long as it takes.
        api_key: sent with every call, where the server has keys.
        credentials: TLS, as `grpc.ssl_channel_credentials` makes them; None speaks plain text.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: float | None = None,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._address = address
        self._timeout = timeout
        self._metadata = _authorization(api_key)
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)
        self._stub = pb_grpc.LoraServeStub(self._channel)

    def stream(
        self,
        prompt: str | Sequence[int] | None = None,
        params: SamplingParams | None = None,
        **fields: Unpack[RequestFields],
    ) -> Iterator[Delta]:
        """Deltas as the server makes them, of all n answers; closing the iterator cancels the request.

        Args:
            prompt: text or token ids; or else `messages` of a chat.
            params: sampling; None takes the defaults.
            fields: of `RequestFields`.
        """
        call = self._stub.Generate(
            _request(prompt, params, **fields),
            timeout=self._timeout,
            metadata=self._metadata,
        )
        try:
            for message in call:
                yield delta_from_wire(message)
        except grpc.RpcError as error:
            raise _error_of(error, self._address) from None
        finally:
            call.cancel()

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        params: SamplingParams | None = None,
        **fields: Unpack[RequestFields],
    ) -> list[Completion]:
        """The n whole answers to one prompt; arguments as of `stream`."""
        answers = _no_answers(params)
        for delta in self.stream(prompt, params, **fields):
            answers[delta.index].append(delta)
        return answers

    def info(self) -> pb.GetServerInfoResponse:
        """The server's settings and its present load."""
        response: pb.GetServerInfoResponse = self._call(self._stub.GetServerInfo, pb.GetServerInfoRequest())
        return response

    def wait_ready(self, timeout: float) -> None:
        """Return once the server is serving; TimeoutError after `timeout` seconds."""
        health = health_pb2_grpc.HealthStub(self._channel)
        deadline = time.monotonic() + timeout
        while True:
            try:
                if _is_serving(health.Check(health_pb2.HealthCheckRequest(), timeout=1.0)):
                    return
            except grpc.RpcError:
                pass  # not listening yet
            if time.monotonic() > deadline:
                raise TimeoutError(f"no server is ready at {self._address} after {timeout:g} s")
            time.sleep(READY_POLL_S)

    def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _error_of(error, self._address) from None


class AsyncClient(AsyncPooledCalls, AsyncAdapterCalls):
    """The asyncio twin of `Client`: the same methods, arguments and errors, on the running loop."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: float | None = None,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._address = address
        self._timeout = timeout
        self._metadata = _authorization(api_key)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)
        self._stub = pb_grpc.LoraServeStub(self._channel)

    async def stream(
        self,
        prompt: str | Sequence[int] | None = None,
        params: SamplingParams | None = None,
        **fields: Unpack[RequestFields],
    ) -> AsyncIterator[Delta]:
        """As `Client.stream`."""
        call = self._stub.Generate(
            _request(prompt, params, **fields),
            timeout=self._timeout,
            metadata=self._metadata,
        )
        try:
            async for message in call:
                yield delta_from_wire(message)
        except grpc.aio.AioRpcError as error:
            raise _error_of(error, self._address) from None
        finally:
            call.cancel()

    async def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        params: SamplingParams | None = None,
        **fields: Unpack[RequestFields],
    ) -> list[Completion]:
        """As `Client.generate`."""
        answers = _no_answers(params)
        async for delta in self.stream(prompt, params, **fields):
            answers[delta.index].append(delta)
        return answers

    async def info(self) -> pb.GetServerInfoResponse:
        """As `Client.info`."""
        request = pb.GetServerInfoRequest()
        response: pb.GetServerInfoResponse = await self._call(self._stub.GetServerInfo, request)
        return response

    async def wait_ready(self, timeout: float) -> None:
        """As `Client.wait_ready`."""
        health = health_pb2_grpc.HealthStub(self._channel)
        deadline = time.monotonic() + timeout
        while True:
            try:
                if _is_serving(await health.Check(health_pb2.HealthCheckRequest(), timeout=1.0)):
                    return
            except grpc.aio.AioRpcError:
                pass  # not listening yet
            if time.monotonic() > deadline:
                raise TimeoutError(f"no server is ready at {self._address} after {timeout:g} s")
            await asyncio.sleep(READY_POLL_S)

    async def close(self) -> None:
        """As `Client.close`."""
        await self._channel.close(None)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=self._timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise _error_of(error, self._address) from None


def _request(
    prompt: str | Sequence[int] | None,
    params: SamplingParams | None,
    *,
    messages: Sequence[Mapping[str, Any]] | None = None,
    chat: ChatOptions | None = None,
    tools: Sequence[Mapping[str, Any] | Tool] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool | None = None,
    thinking_token_budget: int | None = None,
    adapter: AdapterSpec = None,
    deadline_s: float | None = None,
    truncate: int | None = None,
    cache_salt: str | None = None,
    suffix: str | None = None,
    user: str | None = None,
) -> pb.GenerateRequest:
    options = chat or ChatOptions()
    if any(value is not None for value in (tools, tool_choice, parallel_tool_calls)):
        options = replace(options, tools=ToolOptions.from_fields(tools, tool_choice, parallel_tool_calls))
    if thinking_token_budget is not None:
        options = replace(options, thinking_budget=thinking_token_budget)
    return request_to_wire(
        GenerateRequest(
            prompt=prompt,
            messages=messages,
            chat=options,
            adapter=adapter,
            params=params or SamplingParams(),
            deadline_s=deadline_s,
            truncate=truncate,
            cache_salt=cache_salt,
            suffix=suffix,
            user=user,
        )
    )


def _authorization(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


def _no_answers(params: SamplingParams | None) -> list[Completion]:
    return [Completion() for _ in range(1 if params is None else params.n)]


def _is_serving(response: health_pb2.HealthCheckResponse) -> bool:
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def _error_of(error: Any, address: str) -> LoraserveError | TimeoutError:
    """The typed error behind a failed call: the server names its class in the trailing metadata."""
    code, details = error.code(), error.details() or ""
    typed = typed_error(error.trailing_metadata() or (), details)
    if typed is not None:
        return typed
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimeoutError(f"no complete answer from {address} in time")
    if code == grpc.StatusCode.UNAVAILABLE:
        return EngineStoppedError(f"no server answers at {address}: {details}")
    return LoraserveError(f"{code.name}: {details}")
