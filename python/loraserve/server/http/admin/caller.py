"""Who may administer: an admin key; without any keys, whoever sits at this machine."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request

from loraserve.errors import PermissionDeniedError
from loraserve.server.access.keys import PROXY_HEADERS, Caller, is_loopback
from loraserve.server.http.auth import current_caller
from loraserve.server.http.state import HttpState, http_state

REMEDY = "configure an admin key to administer from elsewhere"


async def admin_caller(
    request: Request,
    state: Annotated[HttpState, Depends(http_state)],
    caller: Annotated[Caller, Depends(current_caller)],
) -> Caller:
    """Raises UnauthenticatedError, PermissionDeniedError: the caller is no administrator."""
    caller.require_admin()
    if not state.access.has_keys:
        check_is_local(request)
    return caller


def check_is_local(request: Request) -> None:
    """Raises PermissionDeniedError where a loopback connection does not come from a person at this machine.

    A proxy on this machine connects for others. A web page that a browser here shows may send requests too:
    it then names its own Origin, or has had its own host name resolve to this machine (DNS rebinding).
    """
    for name in PROXY_HEADERS:
        if name in request.headers:
            raise PermissionDeniedError(f"the request came through a proxy ({name}), {REMEDY}")
    host = request.headers.get("host", "")
    if not _is_local_name(host):
        raise PermissionDeniedError(f"host is {host[:100]!r}, which is not this machine's own name, {REMEDY}")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        raise PermissionDeniedError(f"the page of origin {origin[:100]!r} may not administer, {REMEDY}")


def _is_local_name(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or is_loopback(name)
