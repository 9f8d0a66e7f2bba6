"""`Channel`: messages between two processes, over one end of a socket pair.

message: 1 byte, its kind; 8 bytes, its length; so many bytes
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from contextlib import suppress
from enum import IntEnum
from typing import Any

_HEAD = struct.Struct("<BQ")
MAX_NBYTES = 2**28  # of a message; what is larger is received into a place of its size


class Message(IntEnum):
    """What a message says."""

    START = 1  # JSON: what to load; answered READY
    READY = 2
    FAILED = 3  # text: the rank can't go on
    STEP = 4  # a batch to compute
    LOGITS = 5  # JSON: first and count of the rows that the last step gave out
    MOVE = 6  # JSON: slot, source, target, pages
    BIND = 7  # JSON: slot, first page of what was loaded for it
    LOAD = 8  # JSON: `LoadHead`; then a layout, then its bytes; answered DONE
    PING = 9  # answered DONE
    DONE = 10


class Channel:
    """One end. What it raises is OSError, TimeoutError among them; EOFError where the other end is gone.

    Args:
        connection: of a pair; closed with the channel.
        timeout_s: of each sending, and of receiving where nothing else is said.
    """

    def __init__(self, connection: socket.socket, timeout_s: float | None) -> None:
        self.connection = connection
        self._timeout_s = timeout_s
        self._sends = threading.Lock()

    def send(self, kind: Message, *parts: bytes | memoryview) -> None:
        """One message of these parts, whole, whoever else sends."""
        nbytes = sum(len(part) for part in parts)
        with self._sends:
            self.connection.settimeout(self._timeout_s)
            self.connection.sendall(_HEAD.pack(kind, nbytes))
            for part in parts:
                self.connection.sendall(part)

    def send_json(self, kind: Message, value: Any) -> None:
        """One message, whose bytes are JSON."""
        self.send(kind, json.dumps(value).encode())

    def receive(self, timeout_s: float | None = None) -> tuple[Message, bytearray]:
        """The next message; one thread receives."""
        self.connection.settimeout(timeout_s or self._timeout_s)
        head = bytearray(_HEAD.size)
        self._fill(memoryview(head))
        kind, nbytes = _HEAD.unpack(head)
        if nbytes > MAX_NBYTES:
            raise EOFError(f"a message of {nbytes} bytes is no message")
        data = bytearray(nbytes)
        self._fill(memoryview(data))
        return Message(kind), data

    def receive_into(self, place: memoryview) -> None:
        """The next message, of exactly the bytes that `place` has."""
        head = bytearray(_HEAD.size)
        self._fill(memoryview(head))
        _, nbytes = _HEAD.unpack(head)
        if nbytes != len(place):
            raise EOFError(f"a message has {nbytes} bytes, expected {len(place)}")
        self._fill(place)

    def expect(self, kind: Message, timeout_s: float | None = None) -> None:
        """Receive a message of this kind. Raises EOFError with a FAILED one's text, too."""
        found, data = self.receive(timeout_s)
        if found is not kind:
            raise EOFError(data.decode(errors="replace") or f"{found.name} in place of {kind.name}")

    def close(self) -> None:
        """Whoever waits at either end finds out."""
        with suppress(OSError):  # the other end is gone
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def _fill(self, place: memoryview) -> None:
        while place:
            count = self.connection.recv_into(place)
            if count == 0:
                raise EOFError("the other end is closed")
            place = place[count:]
