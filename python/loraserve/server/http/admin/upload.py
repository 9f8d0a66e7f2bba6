"""Adapters as the body of a request: which requests are such, and their bytes as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from fastapi import HTTPException, Request

from loraserve.adapters.stored import MAX_ADAPTER_NBYTES
from loraserve.errors import InvalidRequestError
from loraserve.server.http.errors import UNREAD_BODY

OCTETS: Final = "application/octet-stream"
PARAMETERS: Final = ("config", "replace", "pin", "warm", "expected_generation", "share", "shadow", "weight")
# A file in some other dress; curl gives -T no type, and --data-binary that of a form's fields.
WRONG_TYPES: Final = ("application/json", "multipart/")


def check_upload(request: Request) -> None:
    """Refuses what could not be meant, before the body is read.

    Raises:
        HTTPException: 413 for a body that is too large, 415 for one that is not the file itself.
        InvalidRequestError: a parameter is unknown.
    """
    unknown = [name for name in request.query_params if name not in PARAMETERS]
    if unknown:
        raise InvalidRequestError(
            f"parameter {unknown[0]!r:.100} is not known, known are {', '.join(PARAMETERS)}"
        )
    given = request.headers.get("content-type", OCTETS)
    encoding = request.headers.get("content-encoding", "identity")
    if given.lower().startswith(WRONG_TYPES) or encoding.strip().lower() != "identity":
        text = (
            f"content-type is {given[:100]!r} and content-encoding {encoding[:100]!r}, send the file as it is"
        )
        raise HTTPException(415, text, UNREAD_BODY)
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > MAX_ADAPTER_NBYTES:
        text = f"the body is larger than the limit of {MAX_ADAPTER_NBYTES} bytes, load a directory"
        raise HTTPException(413, text, UNREAD_BODY)


async def received(request: Request) -> AsyncIterator[bytes]:
    """The body, as it comes."""
    async for chunk in request.stream():
        yield chunk
