"""`LocalRun`: requests answered on the threads that ask, a list of them or an iterator of any length."""

from __future__ import annotations

import queue
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress

from tqdm.auto import tqdm

from loraserve.config import EngineConfig
from loraserve.engine.engine import Engine
from loraserve.engine.frontend import MAX_PREPARED_AGAIN, Frontend
from loraserve.engine.gathering import GatheredRequest, Gathering
from loraserve.engine.request_adapters import AdapterReplacedError
from loraserve.engine.sequence import EngineOutputs
from loraserve.engine.shadow_traffic import OutputTap, ShadowTraffic
from loraserve.errors import EngineStoppedError, InvalidRequestError, LoraserveError
from loraserve.pooling.head import ClassificationHead
from loraserve.request import AdapterSpec, BatchOutput, GenerateRequest, RequestOutput

PROGRESS_DELAY_S = 1.0  # batches that end sooner show no progress bar


class LocalRun:
    """An engine and whose answers come from it; calls from several threads take turns.

    Args:
        config: what to load.

    Raises:
        ModelError, AdapterFormatError, InvalidRequestError, CapacityError, DeviceError: it can't be loaded.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._turn = _Turn()
        self._call = threading.Lock()
        self._events: queue.SimpleQueue[EngineOutputs] = queue.SimpleQueue()
        tap = OutputTap(self._events.put)
        self.engine = Engine(config, tap)
        self._shadows = ShadowTraffic(self.engine, tap)
        self._frontend: Frontend[GatheredRequest] = Frontend(self.engine, self._shadows)

    @property
    def is_in_call(self) -> bool:
        """Whether this thread is."""
        return self._turn.lock.locked()

    def one_call(self) -> threading.Lock:
        """To be held while this thread is in a call.

        Raises:
            InvalidRequestError: it is in one already, which may hold a lock that this one would wait for.
            EngineStoppedError: this is a forked child.
        """
        self.engine.check_process()
        if self._turn.lock.locked():
            raise InvalidRequestError(
                "this thread is in a call of the same LLM: a signal handler can only close it; "
                "set a flag there, and call when the first call has returned"
            )
        return self._turn.lock

    def run(self, requests: Sequence[GenerateRequest], progress: bool | None) -> list[RequestOutput]:
        """The outputs of all, in order; progress as of `LLM.generate`.

        Raises:
            LoraserveError: some request was refused or failed; the others are aborted.
        """
        with self.one_call():
            return self._answer(requests, progress)

    def head_of(self, adapter: AdapterSpec) -> ClassificationHead | None:
        """What classifies prompts for an adapter, as of `Frontend.head_of`."""
        with self.one_call():
            return self._frontend.head_of(adapter)

    def _answer(self, requests: Sequence[GenerateRequest], progress: bool | None) -> list[RequestOutput]:
        gathering = Gathering(keeps_ended=False)
        gathered = [
            GatheredRequest(gathering, index, request, self._frontend.prepare(request))
            for index, request in enumerate(requests)
        ]
        with self._call:
            try:
                for item in gathered:
                    self._submit(item)
                self._wait(gathering, sum(item.num_open for item in gathered), progress)
            except BaseException:
                for item in gathered:
                    self._frontend.abort(item.request_ids)
                raise
        return [item.output() for item in gathered]

    def _submit(self, item: GatheredRequest) -> None:
        """What was prepared before another thread replaced its adapter is prepared again."""
        for _ in range(MAX_PREPARED_AGAIN):
            try:
                item.request_ids = self._frontend.submit(item.prepared, item)
                return
            except AdapterReplacedError:
                item.prepare(self._frontend.prepare(item.request, item.prepared.arrived_at))
        item.request_ids = self._frontend.submit(item.prepared, item)

    def _wait(self, gathering: Gathering, num_answers: int, progress: bool | None) -> None:
        disable = None if progress is None else not progress
        delay = PROGRESS_DELAY_S if progress is None else 0.0
        with tqdm(total=num_answers, unit="answer", disable=disable, delay=delay) as bar:
            while gathering.num_ended < num_answers:
                num_ended = gathering.num_ended
                self._route(self._events.get())
                if gathering.error is not None:
                    raise gathering.error
                bar.update(gathering.num_ended - num_ended)

    def _route(self, outputs: EngineOutputs) -> None:
        """Hands everybody what is theirs: an iteration between two of its outputs, too."""
        self._frontend.route(outputs, GatheredRequest.on_delta, GatheredRequest.on_error)

    def iterate(
        self, requests: Iterator[GenerateRequest], read_ahead: int, *, ordered: bool
    ) -> Iterator[BatchOutput]:
        """What becomes of each, as of `LLM.generate_iter`."""
        gathering = Gathering(keeps_ended=not ordered)
        held: deque[GatheredRequest] = deque()  # read and not given out, in order; only these if `ordered`
        num_read, num_given, is_exhausted = 0, 0, False
        open_ids: dict[int, list[int]] = {}  # by index
        try:
            while True:
                ended = _next_ended(held if ordered else gathering.ended)
                if ended is not None:
                    num_given += 1
                    open_ids.pop(ended.index, None)
                    yield self._given_out(ended)
                elif not is_exhausted and num_read - num_given < read_ahead:
                    item = self._begun(gathering, num_read, requests)
                    is_exhausted = item is None
                    if item is not None:
                        num_read += 1
                        open_ids[item.index] = item.request_ids
                        if ordered:
                            held.append(item)
                        self._take_events(None)
                elif num_given < num_read:
                    self._take_events(held if ordered else gathering.ended)
                else:
                    return
        finally:
            self._abort_soon([request_id for ids in open_ids.values() for request_id in ids])

    def _begun(
        self, gathering: Gathering, index: int, requests: Iterator[GenerateRequest]
    ) -> GatheredRequest | None:
        """The next request, queued or with its error; None where there is none."""
        item = GatheredRequest(gathering, index)
        try:
            request = next(requests)  # outside any lock: it may use this LLM itself
        except StopIteration:
            return None
        except InvalidRequestError as error:
            item.on_error(error)
            return item
        try:
            with self.one_call():
                item.request = request
                item.prepare(self._frontend.prepare(request))
                with self._call:
                    self._submit(item)
        except EngineStoppedError:
            raise
        except LoraserveError as error:
            item.on_error(error)
        return item

    def _take_events(self, awaited: deque[GatheredRequest] | None) -> None:
        """Routes what has come; of `awaited`, if it has not ended, waits for what comes next.

        Another thread may have routed its end meanwhile: nothing would come of it any more.
        """
        with self.one_call(), self._call:
            with suppress(queue.Empty):
                while True:
                    self._route(self._events.get_nowait())
            if awaited is not None and not _has_ended(awaited):
                self._route(self._events.get())

    def _given_out(self, item: GatheredRequest) -> BatchOutput:
        """Raises EngineStoppedError: the engine has ended, and this answer with it."""
        if item.error is None:
            output = item.output()
            if any(one.finish_reason == "abort" for one in output.completions):
                raise EngineStoppedError("the engine was closed, the answers that were open are not complete")
            return BatchOutput(item.index, output, None)
        if isinstance(item.error, EngineStoppedError) or not isinstance(item.error, LoraserveError):
            raise item.error
        self._frontend.abort(item.request_ids)  # the others of its n answers
        return BatchOutput(item.index, None, item.error)

    def _abort_soon(self, request_ids: list[int]) -> None:
        """On a thread: a dropped iteration may be found anywhere, where the engine is locked as well."""
        if request_ids and not sys.is_finalizing():
            threading.Thread(
                target=self._frontend.abort, args=(request_ids,), name="loraserve-abort", daemon=True
            ).start()


def _next_ended(items: deque[GatheredRequest]) -> GatheredRequest | None:
    """Taken off the left, if that has ended."""
    return items.popleft() if _has_ended(items) else None


def _has_ended(items: deque[GatheredRequest]) -> bool:
    """Whether the first has."""
    return bool(items) and items[0].has_ended


class _Turn(threading.local):
    """A lock for each thread, held while it is in a call; one is taken whole, whenever a signal comes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
