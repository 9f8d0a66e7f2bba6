"""Who calls: the dependency every protected route takes."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.security.http import HTTPAuthorizationCredentials

from loraserve.server.access.keys import PROXY_HEADERS, SCHEME, Caller, is_loopback
from loraserve.server.batches.dispatch import CALLER
from loraserve.server.http.state import HttpState, http_state

_bearer = HTTPBearer(auto_error=False, description="An API key, where the server was given any.")
_api_key = APIKeyHeader(
    name="x-api-key", auto_error=False, description="The same; where there is no Authorization."
)


async def current_caller(
    request: Request,
    state: Annotated[HttpState, Depends(http_state)],
    _documented: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    _documented_too: Annotated[str | None, Depends(_api_key)],
) -> Caller:
    """By `Authorization: Bearer KEY`, or else by `x-api-key: KEY`; lines of a batch come with their caller.

    Raises:
        UnauthenticatedError: the key is missing or unknown.
    """
    if (known := request.scope.get(CALLER)) is not None:
        assert isinstance(known, Caller), "no client can set it"
        return known
    is_direct = request.client is not None and why_not_local(request) is None
    host = request.client.host if is_direct and request.client is not None else ""
    authorization = request.headers.get("authorization")
    if authorization is None and (api_key := request.headers.get("x-api-key")) is not None:
        authorization = f"{SCHEME} {api_key}"
    return state.access.authenticate(authorization, client_host=host)


def why_not_local(request: Request) -> str | None:
    """Why even a loopback connection may not come from a person at this machine; None where it may.

    A proxy on this machine connects for others. A web page that a browser here shows may send requests too:
    it then names its own Origin, or has had its own host name resolve to this machine (DNS rebinding).
    """
    for name in PROXY_HEADERS:
        if name in request.headers:
            return f"the request came through a proxy ({name})"
    host = request.headers.get("host", "")
    if not _is_local_name(host):
        return f"host is {host[:100]!r}, which is not this machine's own name"
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        return f"the request came from a page of origin {origin[:100]!r}"
    return None


def _is_local_name(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or is_loopback(name)
