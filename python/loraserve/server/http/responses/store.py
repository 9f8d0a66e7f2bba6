"""`ResponseStore`: responses that their callers may go on from, for a while, in bounded memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from loraserve.errors import NotStoredError

OVERHEAD_NBYTES = 1024  # of one response, beside its texts


@dataclass(frozen=True, kw_only=True)
class StoreLimits:
    """How much is kept.

    Args:
        max_responses: of all callers together.
        max_nbytes: of them, as JSON, and of the conversations they ended.
        max_age_s: from when a response is kept.
    """

    max_responses: int = 4096
    max_nbytes: int = 64 * 2**20
    max_age_s: float = 24 * 3600.0


@dataclass(frozen=True)
class StoredResponse:
    """One response, as JSON.

    Args:
        body: the response as it was sent.
        items: the whole conversation: what was asked, from the beginning, and the answer's output.
        num_inputs: how many of `items` the answer was made from.
    """

    body: bytes
    items: bytes
    num_inputs: int

    @property
    def nbytes(self) -> int:
        """What it takes of the store."""
        return len(self.body) + len(self.items) + OVERHEAD_NBYTES


class ResponseStore:
    """Responses by caller and id; nobody finds another caller's.

    Over a limit the oldest response of whoever has most bytes goes: no caller can push out all others'.

    Args:
        limits: see `StoreLimits`.
        now: seconds that only go forward.
    """

    def __init__(self, limits: StoreLimits | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits or StoreLimits()
        self._now = now
        self._of_callers: dict[str, OrderedDict[str, tuple[float, StoredResponse]]] = {}
        self._nbytes: dict[str, int] = {}

    @property
    def keeps_any(self) -> bool:
        """Whether anything is kept at all."""
        return self._limits.max_nbytes > 0 and self._limits.max_responses > 0

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return sum(self._nbytes.values())

    def __len__(self) -> int:
        return sum(map(len, self._of_callers.values()))

    def put(self, caller: str, response_id: str, response: StoredResponse) -> None:
        """Keeps a response; one that is larger than all that may be kept is not."""
        self._forget_old()
        if response.nbytes > self._limits.max_nbytes or not self.keeps_any:
            return
        self._of_callers.setdefault(caller, OrderedDict())[response_id] = (self._now(), response)
        self._nbytes[caller] = self._nbytes.get(caller, 0) + response.nbytes
        while self.nbytes > self._limits.max_nbytes or len(self) > self._limits.max_responses:
            self._drop_oldest(max(self._nbytes, key=lambda name: self._nbytes[name]))

    def get(self, caller: str, response_id: str) -> StoredResponse:
        """Raises NotStoredError: the caller has no such response, or not any more."""
        self._forget_old()
        responses = self._of_callers.get(caller)
        if responses is None or response_id not in responses:
            raise NotStoredError(
                f"response {response_id!r:.150} is not kept here, or not any more, for this key"
            )
        return responses[response_id][1]

    def delete(self, caller: str, response_id: str) -> None:
        """Forgets a response. Raises NotStoredError."""
        self.get(caller, response_id)
        self._remove(caller, response_id)

    def check_invariants(self) -> None:
        """Raises AssertionError unless what is counted is what is there."""
        for caller, responses in self._of_callers.items():
            assert responses, "a caller without responses is forgotten"
            assert self._nbytes[caller] == sum(one.nbytes for _, one in responses.values())
        assert self._of_callers.keys() == self._nbytes.keys()
        assert self.nbytes <= self._limits.max_nbytes
        assert len(self) <= self._limits.max_responses

    def _forget_old(self) -> None:
        oldest = self._now() - self._limits.max_age_s
        for caller in list(self._of_callers):
            while (responses := self._of_callers.get(caller)) and next(iter(responses.values()))[0] < oldest:
                self._drop_oldest(caller)

    def _drop_oldest(self, caller: str) -> None:
        self._remove(caller, next(iter(self._of_callers[caller])))

    def _remove(self, caller: str, response_id: str) -> None:
        responses = self._of_callers[caller]
        _, response = responses.pop(response_id)
        self._nbytes[caller] -= response.nbytes
        if not responses:
            del self._of_callers[caller], self._nbytes[caller]
