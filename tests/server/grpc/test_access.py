"""Keys on gRPC: every method is checked, on an engine without a model."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loraserve.client import AsyncClient, Client
from loraserve.errors import (
    EngineStoppedError,
    OverloadedError,
    PermissionDeniedError,
)
from loraserve.request import AdapterSpec
from loraserve.server.access.tls import TlsConfig
from loraserve.server.grpc.access import host_of_peer
from loraserve.settings.entries import ApiKey
from loraserve.v1 import loraserve_pb2 as pb
from loraserve.wire.errors import REASON_KEY, RETRY_AFTER_KEY

from tests.server.certificates import Authority
from tests.server.control_server import ControlEngine, ControlServer

KEYS = [
    ApiKey(name="sales", secret="sales-key", adapters=("sql*",), base_model=False),
    ApiKey(name="slow", secret="slow-key", max_concurrent=1),
    ApiKey(name="root", secret="root-key", is_admin=True),
]
SERVICE = pb.DESCRIPTOR.services_by_name["LoraServe"]
FOR_ALL_CALLERS = {"Generate", "Embed", "Classify", "Score", "ListAdapters", "GetServerInfo"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root/new").mkdir(parents=True)
    return tmp_path / "root"


@pytest.fixture
def server(root: Path) -> Iterator[ControlServer]:
    with ControlServer(lambda: ControlEngine("sql", "law"), keys=KEYS, roots=[root]) as server:
        yield server


@pytest.fixture(scope="module")
def refusing() -> Iterator[ControlServer]:
    """For calls that change nothing."""
    with ControlServer(lambda: ControlEngine("sql", "law"), keys=KEYS) as server:
        yield server


def client(server: ControlServer, key: str | None) -> Client:
    return Client(server.grpc_address, timeout=10.0, api_key=key)


def call_status(server: ControlServer, method: str, metadata: list[tuple[str, str]]) -> grpc.StatusCode:
    """The status of a call of any method with an empty message."""
    descriptor = SERVICE.methods_by_name[method]
    with grpc.insecure_channel(server.grpc_address) as channel:
        kinds: dict[tuple[bool, bool], Any] = {
            (False, False): channel.unary_unary,
            (False, True): channel.unary_stream,
            (True, False): channel.stream_unary,
        }
        make = kinds[descriptor.client_streaming, descriptor.server_streaming]
        call: Any = make(f"/{SERVICE.full_name}/{method}")
        try:
            message = iter([b""]) if descriptor.client_streaming else b""
            answer = call(message, timeout=10.0, metadata=metadata)
            if descriptor.server_streaming:
                list(answer)
        except grpc.RpcError as error:
            status: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
            return status
    return grpc.StatusCode.OK


@pytest.mark.parametrize("method", [method.name for method in SERVICE.methods])
@pytest.mark.parametrize("value", [None, "Bearer wrong", "sales-key", "Basic c2FsZXM="])
def test_no_method_answers_without_a_key(refusing: ControlServer, method: str, value: str | None) -> None:
    metadata = [] if value is None else [("authorization", value)]
    assert call_status(refusing, method, metadata) == grpc.StatusCode.UNAUTHENTICATED
    assert refusing.engine.requests == []


@pytest.mark.parametrize("method", sorted({method.name for method in SERVICE.methods} - FOR_ALL_CALLERS))
def test_what_is_not_for_all_callers_needs_an_admin(refusing: ControlServer, method: str) -> None:
    status = call_status(refusing, method, [("authorization", "Bearer sales-key")])
    assert status == grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("key", "adapter", "may"),
    [
        ("sales-key", "sql", True),
        ("sales-key", "law", False),
        ("sales-key", None, False),
        ("sales-key", {"sql": 0.5, "law": 0.5}, False),
        ("slow-key", None, True),
        ("root-key", {"sql": 0.5, "law": 0.5}, True),
    ],
)
def test_a_key_generates_with_its_adapters_only(
    server: ControlServer, key: str, adapter: AdapterSpec, may: bool
) -> None:
    with client(server, key) as caller:
        if may:
            assert caller.generate("one two", adapter=adapter)[0].text == "onetwo"
            return
        with pytest.raises(PermissionDeniedError, match="may not use"):
            caller.generate("one two", adapter=adapter)
    assert server.engine.requests == []
    assert server.metrics.requests == {("grpc", "refused"): 1}


def test_a_key_over_its_concurrency_is_told_when_to_come_back(server: ControlServer) -> None:
    with client(server, "slow-key") as caller:
        stream = caller.stream("hang")
        next(stream)
        with pytest.raises(OverloadedError, match="limit is 1"):
            caller.generate("one")
        stream.close()
    assert server.metrics.requests["grpc", "overloaded"] == 1


def test_overload_carries_reason_and_seconds_in_the_metadata(server: ControlServer) -> None:
    metadata = [("authorization", "Bearer slow-key")]
    with client(server, "slow-key") as caller, grpc.insecure_channel(server.grpc_address) as channel:
        stream = caller.stream("hang")
        next(stream)
        call: Any = channel.unary_stream(f"/{SERVICE.full_name}/Generate")
        answer = call(pb.GenerateRequest(text="x").SerializeToString(), metadata=metadata)
        with pytest.raises(grpc.RpcError):
            list(answer)
        stream.close()
    found = dict(answer.trailing_metadata())
    assert (found[REASON_KEY], float(found[RETRY_AFTER_KEY]) > 0) == ("busy", True)


def test_a_finished_call_leaves_its_slot(server: ControlServer) -> None:
    with client(server, "slow-key") as caller:
        for _ in range(3):
            assert caller.generate("one")[0].text == "one"


def test_adapters_are_listed_as_far_as_the_caller_may_use_them(server: ControlServer) -> None:
    with client(server, "sales-key") as sales, client(server, "root-key") as admin:
        assert [(adapter.name, adapter.path) for adapter in sales.adapters()] == [("sql", "")]
        assert [(adapter.name, adapter.path) for adapter in admin.adapters()] == [
            ("law", "/adapters/law"),
            ("sql", "/adapters/sql"),
        ]


def test_paths_are_loaded_under_a_root_only(server: ControlServer, root: Path) -> None:
    with client(server, "root-key") as admin:
        admin.load_adapter("new", str(root / ".." / "root" / "new"))
        for path in ("/etc", str(root / ".."), ""):
            with pytest.raises(PermissionDeniedError, match="not under an adapter root"):
                admin.load_adapter("other", path)
    assert server.engine.paths["new"] == str(root / "new")
    assert "other" not in server.engine.paths


def test_without_keys_this_machine_administers(root: Path) -> None:
    with ControlServer(lambda: ControlEngine("sql"), roots=[root]) as server, client(server, None) as local:
        local.load_adapter("new", str(root / "new"))
        local.unload_adapter("sql")
        assert set(server.engine.paths) == {"new"}


@pytest.mark.parametrize("header", ["forwarded", "via", "x-forwarded-for", "x-real-ip"])
def test_without_keys_a_proxy_on_this_machine_does_not_administer(header: str) -> None:
    with ControlServer(lambda: ControlEngine("sql")) as server:
        metadata = [(header, "127.0.0.1")]
        assert call_status(server, "UnloadAdapter", metadata) == grpc.StatusCode.PERMISSION_DENIED
        assert call_status(server, "ListAdapters", metadata) == grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("server_s", "given_s", "deadline_s"),
    [(None, None, None), (5, None, 5), (5, 2, 2), (5, 9, 5), (None, 9, 9)],
)
def test_the_shorter_deadline_counts(
    server_s: float | None, given_s: float | None, deadline_s: float | None
) -> None:
    with (
        ControlServer(ControlEngine, request_timeout_s=server_s) as server,
        client(server, None) as caller,
    ):
        caller.generate("one", deadline_s=given_s)
        assert server.engine.requests[0].deadline_s == deadline_s


def test_health_needs_no_key(server: ControlServer) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:127.0.0.1:5", "127.0.0.1"),
        ("ipv6:[::1]:5", "::1"),
        ("ipv6:%5B::1%5D:5", "::1"),
        ("unix:/tmp/socket", ""),
        ("ipv4", ""),
        ("", ""),
    ],
)
def test_the_host_of_a_peer(peer: str, host: str) -> None:
    assert host_of_peer(peer) == host


def test_tls_serves_both_apis_and_asks_for_a_certificate(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path, "authority"), Authority(tmp_path, "stranger")
    files, own, foreign = authority.issue("server"), authority.issue("client"), stranger.issue("foreign")
    tls = TlsConfig(certificate=files.certificate, key=files.key, client_ca=authority.certificate)

    def credentials(certificate: Any) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            authority.certificate.read_bytes(),
            certificate.key.read_bytes(),
            certificate.certificate.read_bytes(),
        )

    with ControlServer(lambda: ControlEngine("sql"), keys=KEYS, tls=tls) as server:
        context = ssl.create_default_context(cafile=str(authority.certificate))
        with httpx.Client(verify=context) as plain, pytest.raises(httpx.TransportError):
            plain.get(f"{server.url}/health")
        context.load_cert_chain(own.certificate, own.key)
        with httpx.Client(verify=context) as known:
            assert known.get(f"{server.url}/health").status_code == 200
            assert known.get(f"{server.url}/info").status_code == 401

        async def generate(certificate: Any) -> str:
            address = server.grpc_address
            async with AsyncClient(
                address, timeout=5.0, api_key="root-key", credentials=credentials(certificate)
            ) as caller:
                return (await caller.generate("one"))[0].text

        assert asyncio.run(generate(own)) == "one"
        with pytest.raises((EngineStoppedError, TimeoutError)):
            asyncio.run(generate(foreign))


@pytest.mark.parametrize(
    ("method", "data"),
    [
        *((method, data) for method in sorted(FOR_ALL_CALLERS) for data in (b"\xff", b"\x0a\x05ab")),
        ("Generate", b"\x22\x02\xff\xfe"),  # text that is not UTF-8
        ("LoadAdapter", b"\x0a\x02\xff\xfe"),
    ],
)
def test_bytes_that_are_no_message_are_refused_in_one_line(
    refusing: ControlServer, caplog: pytest.LogCaptureFixture, data: bytes, method: str
) -> None:
    caplog.set_level("INFO")
    with grpc.insecure_channel(refusing.grpc_address) as channel:
        name = f"/{SERVICE.full_name}/{method}"
        key = (("authorization", "Bearer root-key"),)
        call = channel.unary_stream(name)(data, metadata=key) if method == "Generate" else None
        with pytest.raises(grpc.RpcError) as caught:
            list(call) if call is not None else channel.unary_unary(name)(data, metadata=key)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "are no message of this method" in caught.value.details()
    assert [record.exc_info for record in caplog.records if record.levelname != "DEBUG"] == [None]
