"""Who calls: the dependency every protected route takes."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPBearer
from fastapi.security.http import HTTPAuthorizationCredentials

from loraserve.server.access.keys import Caller
from loraserve.server.http.state import HttpState, http_state

_bearer = HTTPBearer(auto_error=False, description="An API key, where the server was given any.")


async def current_caller(
    request: Request,
    state: Annotated[HttpState, Depends(http_state)],
    _documented: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Caller:
    """Raises UnauthenticatedError: the key is missing or unknown."""
    host = request.client.host if request.client is not None else ""
    return state.access.authenticate(request.headers.get("authorization"), client_host=host)
