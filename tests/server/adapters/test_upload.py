"""Adapters sent over HTTP and gRPC: served as from a directory, within bounds, and gone with their names."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import torch
from loraserve import AsyncEngine, EngineConfig
from loraserve.adapters.stored import AdapterStore
from loraserve.client import Client
from loraserve.errors import AdapterFormatError, CapacityError, InvalidRequestError, LoraserveError
from loraserve.sampling_params import SamplingParams
from loraserve.server.adapters.state import AdapterState
from loraserve.server.grpc import upload
from loraserve.v1 import loraserve_pb2 as pb
from loraserve.v1 import loraserve_pb2_grpc as pb_grpc

from tests.e2e.tiny import NUM_TOKENS, PROMPT
from tests.server.control_server import ControlServer

GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)

Send = Callable[..., None]


class Sent:
    """The two files of a PEFT directory."""

    def __init__(self, directory: str) -> None:
        self.weights = (Path(directory) / "adapter_model.safetensors").read_bytes()
        self.config: dict[str, Any] = json.loads((Path(directory) / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterState]:
    state = AdapterState(tmp_path_factory.mktemp("state"))
    yield state
    state.close()


@pytest.fixture(scope="module")
def server(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str], kept: AdapterState
) -> Iterator[ControlServer]:
    config = EngineConfig(model=str(tiny_model[0]), dtype="float32", memory="8MiB")
    roots = [Path(tiny_adapters["a0"]).parent]
    with ControlServer(lambda: AsyncEngine(config), roots=roots, kept=kept) as server:
        yield server


def over_http(server: ControlServer) -> Send:
    def send(name: str, sent: Sent, *, replace: bool = False) -> None:
        answer = httpx.put(
            f"{server.url}/adapters/{name}",
            params={"config": json.dumps(sent.config), "replace": replace},
            content=sent.weights,
            timeout=60,
        )
        if answer.status_code != 201:
            kind = CapacityError if "CapacityError" in answer.text else LoraserveError
            raise kind(answer.text)

    return send


def over_grpc(server: ControlServer) -> Send:
    def send(name: str, sent: Sent, *, replace: bool = False) -> None:
        with Client(server.grpc_address, timeout=60) as client:
            client.upload_adapter(name, sent.weights, sent.config, replace=replace)

    return send


@pytest.fixture(params=[over_http, over_grpc], ids=["http", "grpc"])
def send(request: pytest.FixtureRequest, server: ControlServer) -> Send:
    return request.param(server)


def answer(server: ControlServer, adapter: str) -> tuple[int, ...]:
    with Client(server.grpc_address, timeout=60) as client:
        return tuple(client.generate(PROMPT, GREEDY, adapter=adapter)[0].token_ids)


def store_of(server: ControlServer) -> AdapterStore:
    return server.engine._engine.adapters.tensor_store


def check_empty(server: ControlServer) -> None:
    """Room is given back by the engine's next step, or once a call has ended on its side too."""
    until = time.monotonic() + 10
    while (nbytes := store_of(server).nbytes) > 0:
        assert time.monotonic() < until, f"{nbytes} bytes are still taken"
        time.sleep(0.05)


def unload(server: ControlServer, name: str) -> None:
    with Client(server.grpc_address, timeout=60) as client:
        client.unload_adapter(name)
        client.generate(PROMPT, GREEDY)  # a step, which forgets what nobody uses


def test_an_adapter_that_is_sent_answers_as_peft_does_and_is_replaced_and_forgotten(
    server: ControlServer,
    send: Send,
    kept: AdapterState,
    tiny_adapters: dict[str, str],
    tiny_expected: dict[str, list[int]],
) -> None:
    send("x", Sent(tiny_adapters["a5"]))
    assert answer(server, "x") == tuple(tiny_expected["a5"])
    with pytest.raises(LoraserveError, match="x"):
        send("x", Sent(tiny_adapters["a6"]))
    assert answer(server, "x") == tuple(tiny_expected["a5"])
    send("x", Sent(tiny_adapters["a6"]), replace=True)
    assert answer(server, "x") == tuple(tiny_expected["a6"])
    shown = httpx.get(f"{server.url}/adapters/x", timeout=30).json()
    assert shown["path"] == "memory:x"
    with Client(server.grpc_address, timeout=60) as client:
        loaded = client.load_adapter("same", tiny_adapters["a6"])
    assert shown["receipt"]["hash"] == loaded.hash
    assert "x" not in kept.adapters
    assert "same" in kept.adapters
    unload(server, "x")
    unload(server, "same")
    check_empty(server)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda sent: setattr(sent, "weights", sent.weights[:-10]),
            "memory:x is not a valid safetensors file",
        ),
        (lambda sent: setattr(sent, "weights", b""), "is empty|needs 8"),
        (lambda sent: setattr(sent, "weights", b"PK\3\4 archive/data.pkl"), "a pickle, which is not loaded"),
        (lambda sent: sent.config.update(peft_type="VERA"), "field 'peft_type' is"),
        (lambda sent: sent.config.update(r=3), "rank"),
        (lambda sent: sent.config.clear(), "field 'peft_type'"),
    ],
)
def test_what_is_no_adapter_is_refused_and_leaves_nothing(
    server: ControlServer,
    send: Send,
    tiny_adapters: dict[str, str],
    change: Callable[[Sent], Any],
    words: str,
) -> None:
    sent = Sent(tiny_adapters["a5"])
    change(sent)
    with pytest.raises(LoraserveError, match=words):
        send("x", sent)
    check_empty(server)
    assert httpx.get(f"{server.url}/adapters/x", timeout=30).status_code == 404


def test_a_name_that_is_not_allowed_is_refused_before_the_bytes_are_taken(
    server: ControlServer, send: Send, tiny_adapters: dict[str, str]
) -> None:
    with pytest.raises(LoraserveError, match="not allowed"):
        send("_sum", Sent(tiny_adapters["a5"]))
    check_empty(server)


def test_what_is_too_large_is_refused(
    server: ControlServer, send: Send, tiny_adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_of(server), "max_adapter_nbytes", 1000)
    with pytest.raises(CapacityError, match="has more than 1000 bytes"):
        send("x", Sent(tiny_adapters["a5"]))
    check_empty(server)


@pytest.mark.parametrize(
    ("params", "headers", "status", "words"),
    [
        ({}, {}, 400, "config"),
        ({"config": "{"}, {}, 400, "is not a valid adapter config"),
        ({"config": "x" * 2**15 + "x"}, {}, 400, "config"),
        ({"config": "{}", "name": "y"}, {}, 400, "parameter 'name' is not known"),
        ({"config": "{}"}, {"content-type": "application/json"}, 415, "send the file as it is"),
        (
            {"config": "{}"},
            {"content-type": "multipart/form-data; boundary=x"},
            415,
            "send the file as it is",
        ),
        ({"config": "{}"}, {"content-encoding": "gzip"}, 415, "send the file as it is"),
    ],
)
def test_http_says_what_is_wrong_with_an_upload(
    server: ControlServer, params: dict[str, str], headers: dict[str, str], status: int, words: str
) -> None:
    response = httpx.put(f"{server.url}/adapters/x", params=params, headers=headers, content=b"x", timeout=30)
    assert response.status_code == status, response.text
    assert words in response.text


def test_a_body_that_says_it_is_too_large_is_refused_unread(server: ControlServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"PUT /adapters/x?config={{}} HTTP/1.1\r\nhost: {host}:{port}\r\n"
        request = f"{head}content-length: 2147483649\r\n\r\n"
        connection.sendall(request.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"larger than the limit of 2147483648" in answer


def parts(*messages: dict[str, Any]) -> Iterator[pb.UploadAdapterRequest]:
    for message in messages:
        yield pb.UploadAdapterRequest(**message)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "an upload begins with a head"),
        ([{"data": b"x"}], "an upload begins with a head"),
        ([{}], "an upload begins with a head"),
        (
            [{"head": pb.UploadAdapterHead(name="x")}, {"head": pb.UploadAdapterHead(name="x")}],
            "an upload has data after its head",
        ),
        ([{"head": pb.UploadAdapterHead(name="x", config_json="{}")}], "is empty|needs 8|peft_type"),
        ([{"head": pb.UploadAdapterHead(name="", config_json="{}")}], "not allowed"),
    ],
)
def test_grpc_says_what_is_wrong_with_an_upload(
    server: ControlServer, messages: list[dict[str, Any]], words: str
) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = pb_grpc.LoraServeStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            stub.UploadAdapter(parts(*messages), timeout=30)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    details = error.value.details()  # type: ignore[attr-defined]
    assert any(word in details for word in words.split("|")), details
    check_empty(server)


def test_a_sender_that_leaves_gives_its_room_back(
    server: ControlServer, tiny_adapters: dict[str, str]
) -> None:
    sent = Sent(tiny_adapters["a5"])

    def leaves() -> Iterator[pb.UploadAdapterRequest]:
        yield pb.UploadAdapterRequest(
            head=pb.UploadAdapterHead(name="x", config_json=json.dumps(sent.config))
        )
        yield pb.UploadAdapterRequest(data=bytes(2**21))
        call.cancel()

    with grpc.insecure_channel(server.grpc_address) as channel:
        call: Any = None
        call = pb_grpc.LoraServeStub(channel).UploadAdapter.future(leaves(), timeout=30)
        with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
            call.result()
    with Client(server.grpc_address, timeout=60) as client:
        assert [adapter.name for adapter in client.adapters() if adapter.name == "x"] == []
    check_empty(server)


def test_an_upload_that_stops_coming_is_given_up(
    server: ControlServer, tiny_adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "IDLE_LIMIT_S", 0.2)
    head = {"head": pb.UploadAdapterHead(name="x", config_json=json.dumps(Sent(tiny_adapters["a5"]).config))}
    for messages in ([], [head], [head, {"data": b"x"}]):
        given_up = threading.Event()

        def stops(messages: list[dict[str, Any]] = messages, end: threading.Event = given_up) -> Any:
            yield from parts(*messages)
            end.wait(30)

        with grpc.insecure_channel(server.grpc_address) as channel:
            with pytest.raises(grpc.RpcError) as error:
                pb_grpc.LoraServeStub(channel).UploadAdapter(stops(), timeout=30)
            given_up.set()
        assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
        assert "nothing of the upload has come" in error.value.details()  # type: ignore[attr-defined]
    check_empty(server)


def test_errors_keep_their_types_over_grpc(server: ControlServer, tiny_adapters: dict[str, str]) -> None:
    sent = Sent(tiny_adapters["a5"])
    with Client(server.grpc_address, timeout=60) as client:
        with pytest.raises(AdapterFormatError):
            client.upload_adapter("x", b"", sent.config)
        with pytest.raises(InvalidRequestError):
            client.upload_adapter("a b", sent.weights, sent.config)
