"""Where the APIs listen: addresses, and whether they can be had."""

from __future__ import annotations

import errno
import socket

from loraserve.errors import LoraserveError

MAX_PORT = 2**16 - 1


class ListenError(LoraserveError):
    """The server can't listen on the address it was given."""


def check_can_listen(host: str, port: int, flag: str) -> None:
    """Raises ListenError as `bound_socket` would."""
    bound_socket(host, port, flag).close()


def bound_socket(host: str, port: int, flag: str, backlog: int = 1) -> socket.socket:
    """A socket that listens on `host`:`port`; 0 takes a free port.

    Raises ListenError: the port is taken or not ours to bind; `flag` is what sets another.
    """
    if not 0 <= port <= MAX_PORT:
        raise ListenError(f"port {port} is out of range, choose 0 to {MAX_PORT} with {flag}")
    where = socket_address(host, port)
    try:
        # The protocol too: asyncio turns Nagle's algorithm off for TCP only, and it costs 40 ms an answer.
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ListenError(f"can't listen on {where}: {error.strerror}; see --host and {flag}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(backlog)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            text = f"port {port} on {host} is in use, choose another with {flag} (0 takes a free one)"
        else:
            text = f"can't listen on {where}: {error.strerror}; see --host and {flag}"
        raise ListenError(text) from error
    return bound


def socket_address(host: str, port: int) -> str:
    """host:port as URLs and gRPC write it, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
