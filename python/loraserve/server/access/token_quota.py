"""`TokenQuota`: tokens a minute of one key, reserved before a call is queued; what is not used comes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loraserve.errors import InvalidRequestError, OverloadedError

if TYPE_CHECKING:
    from loraserve.engine.prepared import PreparedRequest

SECONDS_PER_MINUTE = 60.0


class TokenQuota:
    """A bucket that holds a minute's worth of tokens, starts full, and refills evenly.

    Args:
        key: whose it is, for errors.
        per_minute: prompt and generated tokens.
        clock: seconds.
    """

    def __init__(self, key: str, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = key
        self._capacity = max(per_minute, 1.0)
        self._per_second = per_minute / SECONDS_PER_MINUTE
        self._clock = clock
        self._level = self._capacity
        self._filled_at = clock()

    def reserve(
        self, requests: Sequence[PreparedRequest], max_model_len: int
    ) -> tuple[list[PreparedRequest], Reservation]:
        """The requests of one call, their longest answers within what is left, and what they may use.

        An answer for which no length is asked may have what is left.

        Raises:
            OverloadedError: less is left than they ask for; nothing was taken.
            InvalidRequestError: a minute has less.
        """
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._filled_at) * self._per_second)
        self._filled_at = now
        least = sum(_least(request) for request in requests)
        if least > self._capacity:
            raise InvalidRequestError(
                f"the request may take {least} tokens of prompt and answer, key {self._key!r} has "
                f"{self._capacity:g} a minute: ask for fewer"
            )
        if least > self._level:
            wait_s = (least - self._level) / self._per_second
            raise OverloadedError(
                f"key {self._key!r} has {int(self._level)} of its {self._capacity:g} tokens a minute left, "
                f"the request may take {least}, try again in {wait_s:.1f} s",
                retry_after_s=wait_s,
                reason="busy",
            )
        spare, bounded, num_tokens = int(self._level) - least, [], least
        num_open = sum(request.num_sequences for request in requests if _is_open(request))
        for request in requests:
            if _is_open(request):
                room = max_model_len - len(request.prompt_token_ids)
                shortest = max(request.params.min_tokens, 1)
                length = max(min(shortest + spare // num_open, room), shortest)
                num_tokens += (length - shortest) * request.num_sequences
                request = replace(request, params=replace(request.params, max_tokens=length))  # noqa: PLW2901
            bounded.append(request)
        self._level -= num_tokens
        return bounded, Reservation(self, num_tokens)

    def give_back(self, num_tokens: int) -> None:
        """Told by a reservation."""
        self._level = min(self._capacity, self._level + num_tokens)


class Reservation:
    """What a call may use of a quota."""

    def __init__(self, quota: TokenQuota, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._quota = quota

    def settle(self, num_used: int) -> None:
        """The call has ended and used as many tokens; told once."""
        self._quota.give_back(max(self.num_tokens - num_used, 0))
        self.num_tokens = 0


def _is_open(request: PreparedRequest) -> bool:
    """Whether its answers may be as long as the context."""
    return request.request.pooling is None and request.params.max_tokens is None


def _least(request: PreparedRequest) -> int:
    """Tokens that it may take, where no length is asked for those that it takes at least."""
    if request.request.pooling is not None:
        return len(request.prompt_token_ids)
    max_tokens = request.params.max_tokens
    length = max(request.params.min_tokens, 1) if max_tokens is None else max_tokens
    return len(request.prompt_token_ids) + length * request.num_sequences
