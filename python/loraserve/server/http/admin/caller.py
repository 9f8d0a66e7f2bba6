"""Who may administer: an admin key; without any keys, whoever sits at this machine."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from loraserve.errors import PermissionDeniedError
from loraserve.server.access.keys import Caller
from loraserve.server.http.auth import current_caller, why_not_local
from loraserve.server.http.state import HttpState, http_state


async def admin_caller(
    request: Request,
    state: Annotated[HttpState, Depends(http_state)],
    caller: Annotated[Caller, Depends(current_caller)],
) -> Caller:
    """Raises UnauthenticatedError, PermissionDeniedError: the caller is no administrator."""
    reason = None if state.access.has_keys else why_not_local(request)
    if reason is not None:
        raise PermissionDeniedError(f"{reason}, configure an admin key to administer from elsewhere")
    caller.require_admin()
    return caller
