"""Clients that dawdle or send too much lose their own connection, and nobody else's."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing

import httpx
import pytest
from loraserve.server.http.state import HttpLimits

from tests.server.http.fake_engine import FakeEngine
from tests.server.http.http_thread import HttpThread
from tests.server.http.soon import soon

LIMITS = HttpLimits(
    max_body_nbytes=2000,
    max_header_nbytes=4000,
    header_timeout_s=0.4,
    body_timeout_s=0.4,
    write_timeout_s=0.4,
    keep_alive_s=1.0,
)
HEAD = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def fake() -> Iterator[HttpThread]:
    with HttpThread(FakeEngine, limits=LIMITS) as server:
        yield server


@pytest.fixture
def connection(fake: HttpThread) -> Iterator[socket.socket]:
    host, _, port = fake.address.rpartition(":")
    with closing(socket.create_connection((host, int(port)), timeout=20.0)) as connection:
        yield connection


@pytest.fixture(autouse=True)
def _others_are_served(fake: HttpThread) -> Iterator[None]:
    """Whatever a test does to the server, somebody else gets an answer before, beside and after it."""
    with httpx.Client(base_url=fake.url, timeout=20.0) as client:
        yield
        assert client.post("/generate", json={"inputs": "one two"}).json() == {"generated_text": "onetwo"}


def everything(connection: socket.socket) -> bytes:
    """What the server still says until it closes."""
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def drip(connection: socket.socket, data: bytes) -> bytes:
    """A byte at a time, slower than any limit allows; then what came back."""
    try:
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
    except OSError:
        pass  # the server has closed
    try:
        return everything(connection)
    except ConnectionResetError:
        return b""


def test_dripped_headers_are_cut_off(connection: socket.socket) -> None:
    started = time.monotonic()
    drip(connection, HEAD * 4)
    assert time.monotonic() - started < 8.0


def test_headers_that_stop_are_answered_408(connection: socket.socket) -> None:
    connection.sendall(HEAD)
    answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"x-request-id: " in answer
    assert b"headers took longer than 0.4 s" in answer


def test_a_body_that_stops_is_answered_408(connection: socket.socket) -> None:
    connection.sendall(HEAD + b'content-length: 100\r\n\r\n{"inputs":')
    answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"body took longer than 0.4 s" in answer


def test_a_dripped_body_is_cut_off(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"content-length: 500\r\n\r\n")
    started = time.monotonic()
    drip(connection, b" " * 500)
    assert time.monotonic() - started < 8.0


def test_a_silent_connection_is_closed_without_a_word(connection: socket.socket) -> None:
    assert everything(connection) == b""


def test_newlines_do_not_keep_a_connection_open(connection: socket.socket) -> None:
    started = time.monotonic()
    drip(connection, b"\r\n" * 60)
    assert time.monotonic() - started < 8.0


@pytest.mark.parametrize("num_headers", [3, 4000])
def test_headers_that_come_in_one_piece_are_counted_too(connection: socket.socket, num_headers: int) -> None:
    header = b"a: " + b"b" * (12_000 // num_headers) + b"\r\n"
    connection.sendall(HEAD + header * num_headers + b"content-length: 2\r\n\r\n{}")
    assert everything(connection).startswith(b"HTTP/1.1 431 ")


def test_a_body_beyond_the_limit_that_is_still_sent_is_answered_413() -> None:
    nbytes = 8 * 2**20  # more than the buffers on the way take
    with HttpThread(FakeEngine, limits=HttpLimits(max_body_nbytes=2000)) as server:
        host, _, port = server.address.rpartition(":")
        with closing(socket.create_connection((host, int(port)), timeout=20.0)) as connection:
            connection.sendall(HEAD + f"connection: close\r\ncontent-length: {nbytes}\r\n\r\n".encode())
            connection.sendall(b" " * nbytes)
            assert everything(connection).startswith(b"HTTP/1.1 413 ")


def test_headers_beyond_the_limit_are_answered_431(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"x-padding: " + b"x" * 5000)
    assert everything(connection).startswith(b"HTTP/1.1 431 ")


def test_a_body_announced_beyond_the_limit_is_answered_413_unread(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"connection: close\r\ncontent-length: 2001\r\n\r\n")
    answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"limit of 2000 bytes" in answer


def test_a_chunked_body_beyond_the_limit_is_answered_413(connection: socket.socket) -> None:
    chunk = b"3e8\r\n" + b" " * 1000 + b"\r\n"
    connection.sendall(HEAD + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n" + chunk * 3)
    assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff\xfe rubbish\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS handshake
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\nhello",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /\xff\xff HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
)
def test_what_is_not_http_is_answered_400_and_closed(connection: socket.socket, data: bytes) -> None:
    connection.sendall(data)
    answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"x-request-id: " in answer


def test_an_answer_that_is_not_read_is_aborted(fake: HttpThread, connection: socket.socket) -> None:
    body = b'{"inputs":"flood"}'
    stream = HEAD.replace(b"/generate", b"/generate_stream")
    connection.sendall(stream + b"content-length: %d\r\n\r\n" % len(body) + body)
    assert soon(lambda: bool(fake.engine.streams) and fake.engine.streams[-1].num_deltas > 1)
    flood = fake.engine.streams[-1]
    assert soon(flood.aborted.is_set)
    assert flood.num_deltas < 10_000


def test_an_idle_connection_is_closed_after_keep_alive(connection: socket.socket) -> None:
    connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
    started = time.monotonic()
    assert everything(connection).startswith(b"HTTP/1.1 200 ")
    assert 0.8 < time.monotonic() - started < 10.0


def test_pipelined_requests_are_answered_in_order(connection: socket.socket) -> None:
    def request(text: str) -> bytes:
        body = b'{"inputs":"%b"}' % text.encode()
        return HEAD + b"content-length: %d\r\n\r\n" % len(body) + body

    connection.sendall(request("one") + request("two"))
    answers = everything(connection)
    assert answers.count(b"HTTP/1.1 200 ") == 2
    assert answers.index(b'"one"') < answers.index(b'"two"')
