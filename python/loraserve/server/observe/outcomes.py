"""How a call ended, for the metrics of HTTP and gRPC alike, and what its answers used together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal, TypeAlias

from loraserve.errors import EngineStoppedError, LoraserveError, OverloadedError
from loraserve.request import Delta, RequestTiming, Usage

Outcome: TypeAlias = Literal["success", "aborted", "refused", "overloaded", "failed"]
"""`aborted`: the client left; `refused`: the request was wrong; `overloaded`: too much was waiting."""


class Answered:
    """What one call has answered so far, of one prompt or several."""

    def __init__(self) -> None:
        self.has_tokens = False
        self.timing: RequestTiming | None = None
        self._usages: list[Usage] = []

    def add(self, delta: Delta) -> None:
        """Raises EngineStoppedError: the answer was cut because the server stops."""
        self.has_tokens = self.has_tokens or bool(delta.token_ids)
        if delta.usage is not None:
            self._usages.append(delta.usage)
        self.timing = delta.timing or self.timing
        if delta.finish_reason == "abort":
            raise EngineStoppedError("the server is shutting down, the answer is not complete; ask again")

    def usage(self, num_prompt_tokens: Sequence[int]) -> Usage | None:
        """Of all answers together; a prompt counts once however many answers it has.

        Args:
            num_prompt_tokens: of each prompt.
        """
        if not self._usages:
            return None
        total = sum(num_prompt_tokens)
        of_each = [usage.cached_tokens for usage in self._usages]
        cached = sum(of_each) if len(num_prompt_tokens) > 1 else max(of_each)
        completion = sum(usage.completion_tokens for usage in self._usages)
        return Usage(total, completion, min(cached, total))


def outcome_of(error: BaseException | None, *, has_tokens: bool) -> Outcome:
    """What `error` makes of a call that had answered with tokens already, or not."""
    if error is None:
        return "success"
    if isinstance(error, asyncio.CancelledError):
        return "aborted"
    if isinstance(error, OverloadedError):
        return "overloaded"
    return "refused" if isinstance(error, LoraserveError) and not has_tokens else "failed"
