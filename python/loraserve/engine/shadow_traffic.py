"""`ShadowTraffic`: copies of requests, run on another generation behind everybody else, and compared.

A copy begins when its original has ended, only where nothing waits, a few at once, and one prompt at a time;
what there is no room or no time for is dropped and counted. Nothing of it is returned to anybody.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final, Literal

from loraserve.engine.engine import Engine
from loraserve.engine.frontend import Frontend
from loraserve.engine.prepared import PreparedRequest, resolve_adapters
from loraserve.engine.request_adapters import AdapterReplacedError
from loraserve.engine.sequence import EngineOutputs
from loraserve.engine.shadow import COPIES_FLOW, Comparison, ShadowedAnswer
from loraserve.engine.versions import SEPARATOR, base_name, generation_name
from loraserve.engine.workers import Workers
from loraserve.errors import (
    AdapterNotFoundError,
    DeadlineError,
    EngineStoppedError,
    LoraserveError,
    OverloadedError,
)
from loraserve.request import Delta, GenerateRequest

logger = logging.getLogger(__name__)

MAX_WAITING: Final = 64  # copies whose originals have ended
MAX_RUNNING: Final = 4
RUNNING_SHARE: Final = 8  # of the sequences that may run at once, copies have one in so many
DEADLINE_S: Final = 120.0  # from the end of the original to that of the copy
POLL_S: Final = 0.02
CROWDED_S: Final = 0.2  # that others have waited when the newest copy makes room
EXIT_S: Final = 5.0


class OutputTap:
    """Hands on what an engine gives out, and keeps it for copies while some of them run.

    Args:
        on_outputs: as of `Engine`.
    """

    def __init__(self, on_outputs: Callable[[EngineOutputs], None]) -> None:
        self.is_open = False
        self._on_outputs = on_outputs
        self._kept: queue.SimpleQueue[tuple[float, EngineOutputs]] = queue.SimpleQueue()

    def __call__(self, outputs: EngineOutputs) -> None:
        """On the engine's thread."""
        if self.is_open:
            self._kept.put((time.monotonic(), outputs))
        self._on_outputs(outputs)

    def take(self) -> list[tuple[float, EngineOutputs]]:
        """What has been kept since the last time, each with when it came, on time.monotonic."""
        taken = []
        with suppress(queue.Empty):
            while True:
                taken.append(self._kept.get_nowait())
        return taken


class ShadowRecording:
    """A request whose answer is noted; see `Recording`. It goes on as a copy when that has ended.

    Args:
        prepared: the request.
        name: of its adapter, which it named without a generation.
        generation: that is to answer the copy.
        on_end: told when the answer is whole.
    """

    def __init__(
        self,
        prepared: PreparedRequest,
        name: str,
        generation: int,
        on_end: Callable[[ShadowRecording], None],
    ) -> None:
        self.name = name
        self.generation = generation
        self.answering = prepared.generations.get(name, 0)
        self.answer = ShadowedAnswer()
        self.ended_at = 0.0  # on time.monotonic
        self._seed = secrets.randbits(63) if prepared.params.seed is None else prepared.params.seed
        self._max_tokens = prepared.params.max_tokens
        self._request = prepared.request
        self._on_end: Callable[[ShadowRecording], None] | None = on_end

    @property
    def seed(self) -> int:
        """Of the first answer, and of the copy."""
        return self._seed

    @property
    def deadline(self) -> float:
        """When the copy must have ended, on time.monotonic."""
        return self.ended_at + DEADLINE_S

    def note(self, delta: Delta) -> None:
        """What a step added to the first answer."""
        self.answer.append(delta)
        if self.answer.is_whole and self._on_end is not None:
            self.ended_at = time.monotonic()
            on_end, self._on_end = self._on_end, None  # which keeps this from now on, and is not to be kept
            on_end(self)

    def copy(self) -> GenerateRequest:
        """What is asked of the other generation: one answer, with the same seed."""
        request = self._request
        (weight,) = (weight for _, weight in resolve_adapters(request.adapter))
        params = replace(request.params, n=1, seed=self._seed, logprobs=None, prompt_logprobs=None)
        return replace(
            request,
            adapter={generation_name(self.name, self.generation): weight},
            params=params,
            flow=COPIES_FLOW,
            deadline_s=DEADLINE_S,
        )

    def bounded(self, copy: PreparedRequest) -> PreparedRequest:
        """A copy for whose length nothing else says a bound has what its original had: a quota's."""
        if copy.params.max_tokens is not None or self._max_tokens is None:
            return copy
        return replace(copy, params=replace(copy.params, max_tokens=self._max_tokens))


class _Copy:
    """One that runs."""

    def __init__(self, recording: ShadowRecording) -> None:
        self.recording = recording
        self.answer = ShadowedAnswer()
        self.error: Exception | None = None
        self.request_ids: list[int] = []

    def on_delta(self, delta: Delta, *, came_at: float) -> None:
        self.answer.append(delta)
        self.answer.noted_late_s = time.monotonic() - came_at

    def on_error(self, error: Exception) -> None:
        self.error = error

    @property
    def has_begun(self) -> bool:
        return bool(self.answer.token_ids) or self.has_ended

    @property
    def has_ended(self) -> bool:
        return self.error is not None or self.answer.finish_reason is not None


class ShadowTraffic:
    """The copies of one engine's requests; a thread of its own runs them while there are any.

    Args:
        engine: answers them. It is not kept by what runs them, and goes away with whoever asks it.
        tap: what the engine gives its outputs to.
    """

    def __init__(self, engine: Engine, tap: OutputTap) -> None:
        self._engine = engine
        self._tap = tap
        self._frontend: Frontend[_Copy] = Frontend(engine)
        self._max_running = max(1, min(MAX_RUNNING, engine.config.max_num_seqs // RUNNING_SHARE))
        self._lock = threading.Lock()  # guards what waits, and whether the thread works
        self._waiting: deque[ShadowRecording] = deque()
        self._running: list[_Copy] = []
        self._is_working = False
        self._crowded_at: float | None = None
        self._workers = Workers("copies of requests", 1, 1)
        self._turns = _Turns()
        self._end = weakref.finalize(self, atexit.unregister, self._turns.leave)
        self._end.atexit = False
        atexit.register(self._turns.leave)

    @property
    def num_open(self) -> int:
        """Copies that wait or run."""
        with self._lock:
            return len(self._waiting) + len(self._running)

    def begin(self, prepared: PreparedRequest) -> ShadowRecording | None:
        """To be told the answer of a request, if it is drawn to be copied; its adapter must have a shadow."""
        if prepared.request.pooling is not None or prepared.params.max_tokens == 0:
            return None
        asked = resolve_adapters(prepared.request.adapter)
        if len(asked) != 1 or asked[0][1] == 0.0 or SEPARATOR in asked[0][0]:
            return None
        name = base_name(asked[0][0])
        generation = self._engine.adapters.generations.draw_shadow(name)
        if generation is None:
            return None
        return ShadowRecording(prepared, name, generation, self._offer)

    def close(self) -> None:
        """Copies end; none begins any more."""
        with self._lock:
            self._waiting.clear()
        self._workers.close()

    def _offer(self, recording: ShadowRecording) -> None:
        """An original has ended: its copy waits for its turn, or is dropped."""
        with self._lock:
            has_room = len(self._waiting) < MAX_WAITING
            if has_room:
                self._waiting.append(recording)
                if not self._is_working:
                    with suppress(EngineStoppedError, OverloadedError):  # it is being closed
                        reference, turns = weakref.ref(self), self._turns
                        self._workers.submit(lambda: _work(reference, turns))
                        self._is_working = True
        if not has_room:
            self._note(recording, "dropped")

    def turn(self) -> bool:
        """Go on with all of them by what can be done now; False where none is left. For its thread alone."""
        try:
            self._route()
            self._end_some()
            self._begin_next()
        except EngineStoppedError:
            self._drop_all()
        except Exception:
            logger.exception("copies of requests failed")
            self._drop_all()
        with self._lock:
            self._tap.is_open = bool(self._running)
            self._is_working = bool(self._waiting or self._running)
            return self._is_working

    def _route(self) -> None:
        """Give copies what the engine has made of them."""
        ids = {request_id for copy in self._running for request_id in copy.request_ids}
        for came_at, outputs in self._tap.take():
            self._frontend.route(
                _only(outputs, ids), partial(_Copy.on_delta, came_at=came_at), _Copy.on_error
            )
        for copy in [copy for copy in self._running if copy.has_ended]:
            self._running.remove(copy)
            if copy.error is not None:
                self._note(copy.recording, _outcome(copy.error))
            elif copy.answer.is_whole:
                self._note(copy.recording, Comparison.of(copy.recording.answer, copy.answer))

    def _end_some(self) -> None:
        """What is not wanted any more, what is late, and where others wait for long the newest."""
        if self._engine.refusal is not None:
            self._drop_all()
            return
        for copy in [copy for copy in self._running if not self._is_wanted(copy.recording)]:
            self._abort(copy)
        if self._is_crowded() and self._running:
            copy = self._running[-1]
            self._abort(copy)
            self._note(copy.recording, "dropped")
        with self._lock:
            late = []
            while self._waiting and self._waiting[0].deadline <= time.monotonic():
                late.append(self._waiting.popleft())
        for recording in late:
            self._note(recording, "dropped")

    def _begin_next(self) -> None:
        if len(self._running) >= self._max_running or not all(copy.has_begun for copy in self._running):
            return
        if self._engine.num_waiting() > 0:
            return
        with self._lock:
            recording = self._waiting.popleft() if self._waiting else None
        if recording is None or not self._is_wanted(recording):
            return
        copy = _Copy(recording)
        try:
            prepared = recording.bounded(self._frontend.prepare(recording.copy(), recording.ended_at))
            self._tap.is_open = True
            copy.request_ids = self._frontend.submit(prepared, copy)
        except EngineStoppedError:
            raise
        except LoraserveError as error:
            self._note(recording, _outcome(error))
        else:
            self._running.append(copy)

    def _is_wanted(self, recording: ShadowRecording) -> bool:
        generations = self._engine.adapters.generations
        return generations.is_shadow(recording.name, recording.generation, recording.answering)

    def _is_crowded(self) -> bool:
        """Whether others have waited since some time, for anything but their adapters."""
        num_own = sum(not copy.has_begun for copy in self._running)
        num_others = self._engine.num_waiting() - self._engine.num_waiting_for_adapters() - num_own
        now = time.monotonic()
        if num_others <= 0 or self._crowded_at is None:
            self._crowded_at = now if num_others > 0 else None
            return False
        is_crowded = now - self._crowded_at >= CROWDED_S
        if is_crowded:
            self._crowded_at = now  # the next one makes room only if that was not enough
        return is_crowded

    def _abort(self, copy: _Copy) -> None:
        self._running.remove(copy)
        self._frontend.abort(copy.request_ids)

    def _drop_all(self) -> None:
        """The engine takes nothing any more: nobody asks what became of them."""
        with self._lock:
            self._waiting.clear()
        with suppress(EngineStoppedError):
            for copy in list(self._running):
                self._abort(copy)
        self._running.clear()

    def _note(
        self, recording: ShadowRecording, outcome: Comparison | Literal["failed", "dropped"] | None
    ) -> None:
        if outcome is not None:
            generations = self._engine.adapters.generations
            generations.note_copy(recording.name, recording.generation, recording.answering, outcome)


class _Turns:
    """Keeps the thread from being in the middle of a turn when the interpreter exits."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held within a turn
        self.is_exiting = False
        self._pid = os.getpid()

    def leave(self) -> None:
        """At the exit: waits for the turn that is being taken, and lets no other begin."""
        self.is_exiting = True
        if os.getpid() == self._pid:
            self.lock.acquire(timeout=EXIT_S)


def _work(reference: weakref.ref[ShadowTraffic], turns: _Turns) -> None:
    """Takes turns until nothing is left, and holds nothing between them."""
    while True:
        with turns.lock:
            traffic = None if turns.is_exiting else reference()
            if traffic is None or not traffic.turn():
                return
            del traffic
        time.sleep(POLL_S)


def _outcome(error: Exception) -> Literal["failed", "dropped"] | None:
    """What came of a copy that was not answered; nothing where its generation is gone, or the engine."""
    if isinstance(error, DeadlineError | OverloadedError):
        return "dropped"
    if isinstance(error, AdapterNotFoundError | AdapterReplacedError | EngineStoppedError):
        return None
    return "failed"


def _only(outputs: EngineOutputs, request_ids: set[int]) -> EngineOutputs:
    """What is of these."""
    places = [place for place, one in enumerate(outputs.request_ids) if one in request_ids]
    return EngineOutputs(
        [outputs.request_ids[place] for place in places],
        [outputs.token_ids[place] for place in places],
        [],
        [end for end in outputs.ends if end.request_id in request_ids],
    )
