"""`GatheredRequest`: a request of this process and its answers so far; `Gathering`: all those of one call."""

from __future__ import annotations

from collections import deque

from loraserve.engine.prepared import PreparedRequest
from loraserve.request import Completion, Delta, GenerateRequest, RequestOutput


class Gathering:
    """What has ended of one call's requests.

    `ended` has them in the order in which they did, where `keeps_ended` says so: whoever asks takes them out.
    """

    def __init__(self, *, keeps_ended: bool) -> None:
        self.num_ended = 0  # answers
        self.ended: deque[GatheredRequest] = deque()
        self.error: Exception | None = None  # the first
        self._keeps_ended = keeps_ended

    def end(self, request: GatheredRequest) -> None:
        """A request has failed, or all its answers are whole."""
        if self._keeps_ended:
            self.ended.append(request)


class GatheredRequest:
    """One request of a gathering; it owns its sequences at the frontend.

    Args:
        gathering: told when it ends.
        index: its place among the requests.
        request, prepared: what is to be submitted; a request that failed before has neither.
    """

    def __init__(
        self,
        gathering: Gathering,
        index: int,
        request: GenerateRequest | None = None,
        prepared: PreparedRequest | None = None,
    ) -> None:
        self.index = index
        self.request_ids: list[int] = []
        self.error: Exception | None = None
        self.num_open = 0  # answers
        self._gathering = gathering
        self._request = request
        if prepared is not None:
            self.prepare(prepared)

    @property
    def request(self) -> GenerateRequest:
        """What is answered."""
        assert self._request is not None, "it was set before this is prepared"
        return self._request

    @request.setter
    def request(self, request: GenerateRequest) -> None:
        self._request = request

    def prepare(self, prepared: PreparedRequest) -> None:
        """What is to be submitted of it, anew."""
        self.prepared = prepared
        self.completions = [Completion() for _ in range(prepared.num_sequences)]
        self.num_open = prepared.num_sequences

    @property
    def has_ended(self) -> bool:
        """Whether it has failed, or all its answers are whole."""
        return self.error is not None or self.num_open == 0

    def on_delta(self, delta: Delta) -> None:
        """What a step added to one of its answers."""
        self.completions[delta.index].append(delta)
        if delta.finish_reason is None:
            return
        self.num_open -= 1
        self._gathering.num_ended += 1
        if self.num_open == 0 and self.error is None:
            self._gathering.end(self)

    def on_error(self, error: Exception) -> None:
        """It is refused, or one of its answers failed; the first error counts."""
        if self.error is not None:
            return
        self.error = error
        self._gathering.error = self._gathering.error or error
        self._gathering.end(self)

    def output(self) -> RequestOutput:
        """All its answers."""
        prompt = self.request.prompt if isinstance(self.request.prompt, str) else None
        return RequestOutput(
            prompt,
            self.prepared.prompt_token_ids,
            self.request.adapter,
            self.completions,
            self.prepared.generations,
        )
