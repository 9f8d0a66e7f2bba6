"""How a call ended, for the metrics of HTTP and gRPC alike."""

from __future__ import annotations

import asyncio
from typing import Literal, TypeAlias

from loraserve.errors import LoraserveError, OverloadedError

Outcome: TypeAlias = Literal["success", "aborted", "refused", "overloaded", "failed"]
"""`aborted`: the client left; `refused`: the request was wrong; `overloaded`: too much was waiting."""


def outcome_of(error: BaseException | None, *, has_tokens: bool) -> Outcome:
    """What `error` makes of a call that had answered with tokens already, or not."""
    if error is None:
        return "success"
    if isinstance(error, asyncio.CancelledError):
        return "aborted"
    if isinstance(error, OverloadedError):
        return "overloaded"
    return "refused" if isinstance(error, LoraserveError) and not has_tokens else "failed"
