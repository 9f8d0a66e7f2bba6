"""The gRPC front end over a fake engine: statuses, cancelling, health, reflection, ports."""

import asyncio
import logging
import socket
import time
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from loraserve import errors
from loraserve.client import AsyncClient, Client
from loraserve.server.grpc.service import SERVICE_NAME
from loraserve.server.listen import ListenError, check_can_listen
from loraserve.v1 import loraserve_pb2 as pb
from loraserve.v1 import loraserve_pb2_grpc as pb_grpc
from loraserve.wire.errors import (
    ERROR_CLASS_KEY,
    MAX_MESSAGE_CHARS,
    STATUS_CODES,
    error_metadata,
    status_message,
    typed_error,
)

from tests.server.fake_engine import FakeEngine
from tests.server.server_thread import ServerThread

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

CODES = [
    ("InvalidRequestError", grpc.StatusCode.INVALID_ARGUMENT),
    ("AdapterFormatError", grpc.StatusCode.INVALID_ARGUMENT),
    ("ModelError", grpc.StatusCode.INVALID_ARGUMENT),
    ("AdapterNotFoundError", grpc.StatusCode.NOT_FOUND),
    ("GenerationConflictError", grpc.StatusCode.ABORTED),
    ("CapacityError", grpc.StatusCode.RESOURCE_EXHAUSTED),
    ("AdapterUnavailableError", grpc.StatusCode.FAILED_PRECONDITION),
    ("SourceUnavailableError", grpc.StatusCode.UNAVAILABLE),
    ("EngineStoppedError", grpc.StatusCode.UNAVAILABLE),
    ("DeviceError", grpc.StatusCode.INTERNAL),
    ("OverloadedError", grpc.StatusCode.RESOURCE_EXHAUSTED),
    ("DeadlineError", grpc.StatusCode.DEADLINE_EXCEEDED),
    ("NotFiniteError", grpc.StatusCode.INTERNAL),
    ("StateError", grpc.StatusCode.INTERNAL),
    ("UnauthenticatedError", grpc.StatusCode.UNAUTHENTICATED),
    ("PermissionDeniedError", grpc.StatusCode.PERMISSION_DENIED),
]


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with ServerThread(FakeEngine) as server:
        yield server


@pytest.fixture
def channel(server: ServerThread) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


def test_a_stream_arrives_piece_by_piece(server: ServerThread) -> None:
    with Client(server.address) as client:
        deltas = list(client.stream("one two three"))
        answer = client.generate("one two three")[0]
    assert [delta.text for delta in deltas] == ["one", "two", "three", ""]
    assert (answer.text, answer.finish_reason, answer.token_ids) == ("onetwothree", "stop", [0, 1, 2])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize("prompt", ["refuse", "late"])
@pytest.mark.parametrize(("name", "code"), CODES)
def test_an_error_becomes_a_status_with_its_text_and_class(
    channel: grpc.Channel, prompt: str, name: str, code: grpc.StatusCode
) -> None:
    call = pb_grpc.LoraServeStub(channel).Generate(pb.GenerateRequest(text=f"{prompt} {name}"))
    with pytest.raises(grpc.RpcError):
        list(call)
    assert call.code() == code
    assert call.details() == f"text of {name}"
    assert dict(call.trailing_metadata())[ERROR_CLASS_KEY] == name


@pytest.mark.parametrize("prompt", ["refuse", "late"])
@pytest.mark.parametrize("name", [name for name, _ in CODES])
def test_both_clients_raise_the_error_the_server_raised(server: ServerThread, prompt: str, name: str) -> None:
    error_class = getattr(errors, name)
    with Client(server.address) as client, pytest.raises(error_class, match=f"text of {name}"):
        client.generate(f"{prompt} {name}")

    async def generate() -> None:
        async with AsyncClient(server.address) as client:
            await client.generate(f"{prompt} {name}")

    with pytest.raises(error_class, match=f"text of {name}"):
        asyncio.run(generate())


def test_an_overload_says_on_both_sides_when_to_come_back() -> None:
    sent = errors.OverloadedError("full", retry_after_s=12.5, reason="adapter_loading")
    received = typed_error(error_metadata(sent), "full")
    assert isinstance(received, errors.OverloadedError)
    assert (received.retry_after_s, received.reason) == (12.5, "adapter_loading")
    assert typed_error([("other", "x")], "full") is None
    assert type(typed_error([(ERROR_CLASS_KEY, "NewerError")], "x")) is errors.LoraserveError


def test_a_conflict_says_on_both_sides_which_generation_is_current() -> None:
    received = typed_error(error_metadata(errors.GenerationConflictError("other", generation=7)), "other")
    assert isinstance(received, errors.GenerationConflictError)
    assert received.generation == 7


def test_every_typed_error_has_a_status_code() -> None:
    typed = {cls for cls in vars(errors).values() if isinstance(cls, type)} - {errors.LoraserveError}
    assert typed == set(STATUS_CODES)


def test_a_bug_becomes_internal_and_its_traceback_stays_in_the_log(
    server: ServerThread, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(server.address) as client, pytest.raises(errors.LoraserveError) as caught:
        client.generate("refuse Surprise")
    assert "INTERNAL: internal error (RuntimeError)" in str(caught.value)
    assert "text of Surprise" not in str(caught.value)
    record = next(record for record in caplog.records if record.levelno == logging.ERROR)
    assert record.exc_info is not None


def test_a_message_longer_than_a_header_is_cut() -> None:
    message = status_message(errors.InvalidRequestError("x" * 10_000))
    assert len(message) == MAX_MESSAGE_CHARS


def test_cancelling_a_call_aborts_its_request(server: ServerThread) -> None:
    with Client(server.address) as client:
        stream = client.stream("hang")
        next(stream)
        stream.close()
        assert _becomes_aborted(server)


def test_a_client_that_disconnects_aborts_its_request(server: ServerThread) -> None:
    channel = grpc.insecure_channel(server.address)
    next(iter(pb_grpc.LoraServeStub(channel).Generate(pb.GenerateRequest(text="hang"))))
    channel.close()
    assert _becomes_aborted(server)


def test_a_cancelled_async_stream_aborts_its_request(server: ServerThread) -> None:
    async def leave_early() -> None:
        async with AsyncClient(server.address) as client:
            await asyncio.wait_for(client.generate("hang"), timeout=1.0)

    with pytest.raises(TimeoutError):
        asyncio.run(leave_early())
    assert _becomes_aborted(server)


def test_a_call_past_its_deadline_raises_timeout_error_and_aborts(server: ServerThread) -> None:
    with Client(server.address, timeout=1.0) as client, pytest.raises(TimeoutError):
        client.generate("hang")
    assert _becomes_aborted(server)


def test_a_client_without_a_server_says_so() -> None:
    with (
        Client("127.0.0.1:1") as client,
        pytest.raises(errors.EngineStoppedError, match=r"no server.*127\.0\.0\.1:1"),
    ):
        client.generate("x")
    with Client("127.0.0.1:1") as client, pytest.raises(TimeoutError, match="no server is ready"):
        client.wait_ready(0.2)


def test_health_is_serving_for_the_server_and_the_service(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", SERVICE_NAME):
        assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == SERVING


def test_health_is_not_serving_once_the_engine_has_stopped(
    server: ServerThread, channel: grpc.Channel
) -> None:
    with Client(server.address) as client, pytest.raises(errors.EngineStoppedError):
        client.generate("refuse EngineStoppedError")
    assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == NOT_SERVING


def test_reflection_lists_the_service(channel: grpc.Channel) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    responses = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
    names = {service.name for service in next(responses).list_services_response.service}
    assert {SERVICE_NAME, "grpc.health.v1.Health"} <= names


def test_a_port_in_use_is_refused_with_the_flag_to_change_it(server: ServerThread) -> None:
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(
        ListenError, match=f"port {port} on 127.0.0.1 is in use, choose another with --grpc-port"
    ):
        check_can_listen("127.0.0.1", port, "--grpc-port")


@pytest.mark.parametrize("address", [("203.0.113.1", 0), ("no-such-host.invalid", 0), ("127.0.0.1", 70000)])
def test_an_address_that_is_not_ours_is_refused(address: tuple[str, int]) -> None:
    with pytest.raises(ListenError):
        check_can_listen(*address, "--grpc-port")


def test_checking_a_free_port_leaves_it_free() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    check_can_listen("127.0.0.1", port, "--grpc-port")
    check_can_listen("127.0.0.1", port, "--grpc-port")


def _becomes_aborted(server: ServerThread) -> bool:
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        if server.engine.streams and server.engine.streams[-1].aborted.is_set():
            return True
        time.sleep(0.01)
    return False
