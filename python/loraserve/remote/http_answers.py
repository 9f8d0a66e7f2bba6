"""What answers of web servers and registries mean to who fetches files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import httpx

from loraserve.remote.store import (
    ChangedError,
    DeniedError,
    NotThereError,
    TransientError,
    WrongAnswerError,
)

REDIRECTS: Final = (301, 302, 303, 307, 308)
_TRANSIENT: Final = (408, 425, 429, 500, 502, 503, 504)
_NOT_THERE: Final = (404, 410)


@contextmanager
def typed_errors() -> Iterator[None]:
    """Words of its own: the library's hold addresses with what gives access in them."""
    try:
        yield
    except httpx.TimeoutException:
        raise TransientError("it did not answer in time") from None
    except httpx.RemoteProtocolError:
        raise TransientError("its answer was cut short") from None
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):
        raise WrongAnswerError("it redirects to what can't be used") from None
    except httpx.HTTPError:
        raise TransientError("it can't be reached") from None


def check_status(answer: httpx.Response, credentials: str) -> None:
    """Raises what a status other than 200 and 206 means; `credentials` says where those come from."""
    status = answer.status_code
    if status in _NOT_THERE:
        raise NotThereError
    if status in (httpx.codes.PRECONDITION_FAILED, httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE):
        raise ChangedError
    if status in _TRANSIENT:
        raise TransientError(f"it answered with status {status}", _retry_after(answer))
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise DeniedError(f"it answered with status {status}; {credentials}")
    if status not in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
        raise WrongAnswerError(f"it answered with status {status}")
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise WrongAnswerError("it compresses what was asked for as it is")


def body(answer: httpx.Response, max_nbytes: int, what: str) -> bytes:
    """All of it. Raises WrongAnswerError: it has more bytes than that."""
    data = bytearray()
    for chunk in answer.iter_raw():
        data += chunk
        if len(data) > max_nbytes:
            raise WrongAnswerError(f"{what} has more than {max_nbytes} bytes, the limit")
    return bytes(data)


def ranged_body(answer: httpx.Response, start: int) -> Iterator[bytes]:
    """The bytes from `start` on, which was asked for; raises TransientError: it sends others."""
    skip = 0
    if start and answer.status_code == httpx.codes.OK:
        skip = start  # it sends all of it again
    elif start and not answer.headers.get("content-range", "").startswith(f"bytes {start}-"):
        raise TransientError("it sends another part than was asked for")
    for chunk in answer.iter_raw():  # as they come: what a larger piece would wait for may not
        yield chunk[skip:] if skip < len(chunk) else b""
        skip = max(0, skip - len(chunk))


def _retry_after(answer: httpx.Response) -> float | None:
    text = answer.headers.get("retry-after", "")
    return float(text) if text.isdecimal() and len(text) < 6 else None
