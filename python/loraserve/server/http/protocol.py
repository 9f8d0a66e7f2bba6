"""HTTP/1.1 connections that may not dawdle: bounded headers, and time limits on every part of a request.

connection ─ header_timeout ─▶ headers complete ─ body_timeout ─▶ body complete ─▶ answer
                                                               (unread longer than write_timeout: cut)
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from loraserve.server.http.state import HttpLimits


def bounded_protocol(limits: HttpLimits) -> type[HttpToolsProtocol]:
    """A protocol class for uvicorn's `http` setting."""

    class Bounded(BoundedHttpProtocol):
        limits_ = limits

    return Bounded


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with the limits of `limits_`; closes what exceeds them and disturbs nobody else."""

    limits_ = HttpLimits()
    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _header_nbytes = 0  # received
    _parsed_nbytes = 0
    _is_in_headers = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first request's headers may take `header_timeout_s` from now."""
        super().connection_made(transport)
        self._arm(self.limits_.header_timeout_s, "headers")

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends all time limits; uvicorn tells the application."""
        self._disarm()
        self._disarm_write()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Counts headers as they come, answers 431 where they exceed `max_header_nbytes`."""
        if self._is_in_headers:
            self._header_nbytes += len(data)
            if self._timer is None:
                self._arm(self.limits_.header_timeout_s, "headers")
        super().data_received(data)
        if self._is_in_headers and self._header_nbytes > self.limits_.max_header_nbytes:
            self._refuse_headers()

    def on_url(self, url: bytes) -> None:
        """Counted with the headers."""
        self._take_header(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Counts headers that came in one piece with what follows them."""
        self._take_header(len(name) + len(value) + len(": \r\n"))
        super().on_header(name, value)

    def on_message_begin(self) -> None:
        """A request's headers may take `header_timeout_s` from now."""
        self._is_in_headers, self._parsed_nbytes = True, 0
        self._arm(self.limits_.header_timeout_s, "headers")
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The body may take `body_timeout_s` from now."""
        self._is_in_headers, self._header_nbytes = False, 0
        self._arm(self.limits_.body_timeout_s, "body")
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is whole: the answer may take as long as it does."""
        self._disarm()
        super().on_message_complete()
        self._is_in_headers = True

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for bytes that are not HTTP; answers in the shape of other errors."""
        if self._parsed_nbytes > self.limits_.max_header_nbytes:
            self._refuse_headers()
        self._refuse(400, "Bad Request", "not an HTTP/1.1 request")

    def pause_writing(self) -> None:
        """The client does not read: it is cut off after `write_timeout_s`."""
        super().pause_writing()
        self._disarm_write()
        self._write_timer = self.loop.call_later(self.limits_.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        self._disarm_write()
        super().resume_writing()

    def _take_header(self, nbytes: int) -> None:
        """Ends the parsing above the limit, which uvicorn takes for bytes that are not HTTP."""
        self._parsed_nbytes += nbytes
        if self._parsed_nbytes > self.limits_.max_header_nbytes:
            raise ValueError("too many headers")

    def _refuse_headers(self) -> None:
        limit = self.limits_.max_header_nbytes
        self._refuse(431, "Request Header Fields Too Large", f"the headers exceed {limit} bytes")

    def _arm(self, seconds: float, part: str) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self._on_timeout, seconds, part)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _disarm_write(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _on_timeout(self, seconds: float, part: str) -> None:
        self._timer = None
        if self.pipeline:  # an answer is under way, and until its end we read no further
            self._arm(seconds, part)
            return
        self._refuse(408, "Request Timeout", f"the request's {part} took longer than {seconds:g} s")

    def _refuse(self, status: int, reason: str, text: str) -> None:
        """Answers if no answer is under way, and closes."""
        if self.transport.is_closing():
            return
        cycle: Any = self.cycle
        is_silent = self._is_in_headers and self._header_nbytes == 0
        if not is_silent and (cycle is None or cycle.response_complete or not cycle.response_started):
            body = f'{{"error":"{text}","error_type":"validation"}}'.encode()
            head = (
                f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nx-request-id: {uuid.uuid4().hex}\r\n"
                "connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
