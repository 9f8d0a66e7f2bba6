"""`BatchService`: batches from their creation to their end, through any end of the process in between."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp

from loraserve.errors import (
    BatchFileError,
    EngineStoppedError,
    InvalidRequestError,
    LoraserveError,
    NotStoredError,
)
from loraserve.server.batches.dispatch import AppDispatcher, batch_urls
from loraserve.server.batches.gate import BatchGate, OwnersSlots
from loraserve.server.batches.lines import BadLine, InputFacts, known_urls, parse_line, read_lines, scan
from loraserve.server.batches.records import (
    MAX_LINES,
    BatchRecord,
    FileRecord,
    LineProblem,
    Status,
    new_batch,
    new_file,
    now,
)
from loraserve.server.batches.results import Counts, ResultFile, error_line, num_lines
from loraserve.server.batches.run import BatchRun
from loraserve.server.batches.store import BatchStore
from loraserve.server.observe.batch_series import BatchCounts
from loraserve.server.observe.logs import log_event

if TYPE_CHECKING:
    from loraserve.server.access.keys import AccessControl

logger = logging.getLogger(__name__)

LOOK_S = 5.0  # between looks for what has expired
RETRY_S = 30.0  # until a file that can't be written is tried again
STOP_S = 0.5  # in which lines that are aborted end
MAX_PROBLEMS = 20
MAX_EXPIRED_PER_TURN = 64


class BatchService:
    """All batches of one server.

    Args:
        store: files and records.
        access: who may what.
        gate: which lets lines through.
    """

    def __init__(self, store: BatchStore, access: AccessControl, gate: BatchGate) -> None:
        self.store = store
        self.gate = gate
        self.lines: Counter[str] = Counter()  # done since the start, by outcome
        self._access = access
        self._app: ASGIApp | None = None
        self._urls: frozenset[str] = frozenset()
        self._runs: dict[str, _Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._looking: asyncio.Task[None] | None = None
        self._is_stopping = False

    def start(self, app: ASGIApp, document: dict[str, Any]) -> None:
        """Goes on with what an earlier process left; `document` is the OpenAPI document of `app`."""
        self._app = app
        self._urls = batch_urls(document)
        for record in sorted(self.store.batches.values(), key=lambda one: one.created_at):
            if not record.is_final:
                self._count_done(record)
                self._begin(record)
        self._looking = asyncio.create_task(self._look_for_expired())

    async def stop(self) -> None:
        """Stops all lines at once; the next start goes on with them."""
        self._is_stopping = True
        if self._looking is not None:
            self._looking.cancel()
        for run in self._runs.values():
            run.stop(None)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_S)
        for task in self._tasks:  # of inputs that are scanned
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self.store.close()

    def check_endpoint(self, endpoint: str) -> None:
        """Raises InvalidRequestError: it is not served in batches."""
        problem = known_urls(self._urls)(endpoint)
        if problem is not None:
            raise InvalidRequestError(problem.replace("url", "endpoint", 1))

    async def create(
        self,
        owner: str,
        endpoint: str,
        input_file_id: str,
        metadata: dict[str, str] | None,
        output_life_s: int | None,
    ) -> BatchRecord:
        """A batch, which begins now.

        Raises:
            NotStoredError: there is no such file.
            InvalidRequestError: it is no input, or the endpoint is not served in batches.
            OverloadedError: the caller has too many.
        """
        self.check_endpoint(endpoint)
        file = self.store.file(owner, input_file_id)
        if file.purpose != "batch":
            raise InvalidRequestError(f"file {file.id!r} is the output of a batch, give one of purpose batch")
        self.store.check_batches(owner)
        record = new_batch(owner, endpoint, file.id, metadata, output_life_s)
        record.times["validating"] = record.created_at
        await self.store.keep_batch(record)
        self._begin(record)
        return record

    async def cancel(self, record: BatchRecord) -> None:
        """Its open lines are aborted, what is done stays. Raises InvalidRequestError: it has ended."""
        if record.is_final:
            raise InvalidRequestError(f"batch {record.id!r} is {record.status}, it can't be cancelled")
        if record.status != "cancelling":
            record.reach("cancelling")
            await self.store.keep_batch(record)
        if (run := self._runs.get(record.id)) is not None:
            run.stop("cancelled")

    def counts(self) -> BatchCounts:
        """What is told of this moment."""
        return BatchCounts(
            by_status=Counter(record.status for record in self.store.batches.values()),
            lines=self.lines,
            num_running_lines=self.gate.num_running,
            num_waiting_lines=self.gate.num_waiting_lines,
            nbytes=self.store.nbytes,
        )

    def _begin(self, record: BatchRecord) -> None:
        run = self._runs[record.id] = _Running(self, record)
        task = asyncio.create_task(self._run(run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, run: _Running) -> None:
        """To its end; what can't be read or written, as on a full disk, is tried again."""
        failure: str | None = None
        try:
            while True:
                try:
                    if failure is None:
                        await run.go(self._dispatcher(run.record.owner), self._urls)
                    else:
                        await run.finish("failed", failure)
                    break
                except EngineStoppedError as error:
                    log_event(logger, "batch stopped", batch=run.record.id, reason=str(error))
                    break
                except BatchFileError as error:
                    level = logging.ERROR
                    log_event(logger, "batch waits", level=level, batch=run.record.id, reason=str(error))
                    await asyncio.sleep(RETRY_S)
                except LoraserveError as error:
                    failure = str(error)
                except Exception:
                    logger.exception("batch %s failed", run.record.id)
                    failure = "internal error, the server's log has the details"
        finally:
            self._runs.pop(run.record.id, None)
        record = run.record
        if record.is_final:
            counts = f"{record.completed} answered, {record.failed} failed"
            log_event(logger, "batch ended", batch=record.id, status=record.status, lines=counts)

    def _count_done(self, record: BatchRecord) -> None:
        """What an earlier process had told of a batch and not kept in its record; a result is a line."""
        for name, file_id in (("completed", record.output_id), ("failed", record.error_id)):
            path = self.store.content(file_id)
            if path.exists():
                setattr(record, name, num_lines(path))

    def _dispatcher(self, owner: str) -> AppDispatcher:
        assert self._app is not None, "it was started"
        return AppDispatcher(self._app, self._access.caller_of(owner))

    async def _look_for_expired(self) -> None:
        while True:
            for run in list(self._runs.values()):
                if run.record.expires_at <= now():
                    run.stop("expired")
            try:
                await self.store.forget_old()
            except LoraserveError as error:
                log_event(logger, "old files not removed", level=logging.ERROR, reason=str(error))
            await asyncio.sleep(LOOK_S)


class _Running:
    """A batch that is not final, and why it is to end early, if it is: None leaves it for the next start."""

    def __init__(self, service: BatchService, record: BatchRecord) -> None:
        self.record = record
        self._service = service
        self._store = service.store
        self._run: BatchRun | None = None
        self._is_stopped = False
        self._end: Status | None = None
        self._counts = Counts()

    def stop(self, end: Status | None) -> None:
        """As cancelled, as expired, or for the next start; the first counts, but for a stop of the server."""
        self._end = None if end is None else self._end or end
        self._is_stopped = True
        if self._run is not None:
            self._run.stop()

    async def go(self, dispatcher: AppDispatcher, urls: frozenset[str]) -> None:
        """From wherever it is to its end. Raises LoraserveError."""
        record, store = self.record, self._store
        if record.status == "cancelling":
            self.stop("cancelled")
        file = store.files.get(record.input_file_id)
        if file is None:
            raise NotStoredError(f"file {record.input_file_id!r} is gone")
        facts, problems = await store.scans.run(self._scan, file)
        record.total = facts.num_requests
        if problems:
            record.problems = problems
            await self.finish("failed")
            return
        if record.status == "validating":
            record.reach("in_progress")
            await store.keep_batch(record)
        with self._results(facts) as results, store.open(file) as lines:
            if not self._is_stopped:
                await self._answer(
                    facts, read_lines(lines, facts, known_urls({record.endpoint})), dispatcher, results
                )
            if self._end == "expired":
                lines.seek(0)
                await self._expire(facts, read_lines(lines, facts, known_urls({record.endpoint})), results)
            elif self._is_stopped and self._end is None:
                return
        await self.finish(self._end or "completed")

    async def _answer(
        self, facts: InputFacts, lines: Iterator[Any], dispatcher: AppDispatcher, results: _TwoFiles
    ) -> None:
        slots = OwnersSlots(self._service.gate, self.record.owner)
        on_done = partial(self._note, results)
        self._run = BatchRun(facts.fingerprint, lines, dispatcher, results, slots, self._counts, on_done)
        await self._run.run()

    def _note(self, results: _TwoFiles) -> None:
        self.record.completed, self.record.failed = results.counts()

    async def _expire(self, facts: InputFacts, lines: Iterator[Any], results: _TwoFiles) -> None:
        """What is not done fails."""
        text = "the batch was not done in its completion window of 24 hours"
        for index, line in enumerate(lines):
            if not results.is_done(line.number):
                told = BadLine(line.number, line.custom_id, "batch_expired", text)
                results.add(line.number, error_line(facts.fingerprint, told), is_completed=False)
            if index % MAX_EXPIRED_PER_TURN == 0:
                await asyncio.sleep(0)
        self._note(results)

    async def finish(self, status: Status, failure: str | None = None) -> None:
        """Its results become files, and it is final. Raises BatchFileError: that can't be written."""
        record, store = self.record, self._store
        if status in ("completed", "expired"):
            record.reach("finalizing")
            await store.keep_batch(record)
        record.has_output = await self._keep(record.output_id, f"{record.id}_output.jsonl")
        record.has_errors = await self._keep(record.error_id, f"{record.id}_error.jsonl")
        final = record.model_copy(deep=True)
        if failure is not None:
            final.problems.append(LineProblem(code="batch_failed", message=failure))
        final.reach(status)
        await store.keep_batch(final)
        self.record = final

    async def _keep(self, file_id: str, filename: str) -> bool:
        path = self._store.content(file_id)
        if file_id in self._store.files:
            return True
        nbytes = path.stat().st_size if path.exists() else 0
        if nbytes == 0:
            path.unlink(missing_ok=True)
            return False
        owner, life_s = self.record.owner, self.record.output_life_s
        await self._store.keep_file(
            new_file(owner, filename, nbytes, life_s, id=file_id, purpose="batch_output")
        )
        return True

    def _scan(self, file: FileRecord) -> tuple[InputFacts, list[LineProblem]]:
        """Facts of the input, and what is wrong with it, on a thread."""
        problems: list[LineProblem] = []
        check = known_urls({self.record.endpoint})
        num_lines = 0

        def on_line(number: int, raw: bytes | None) -> str | None:
            nonlocal num_lines
            num_lines += 1
            if num_lines > MAX_LINES:
                raise InvalidRequestError(f"the input has more than {MAX_LINES} requests, the limit")
            line = parse_line(number, raw, check)
            if isinstance(line, BadLine):
                _add_problem(problems, line)
            return line.custom_id

        try:
            with self._store.open(file) as content:
                facts = scan(content, on_line)
                if facts.repeated and not problems:
                    content.seek(0)
                    for line in read_lines(content, facts, check):
                        if isinstance(line, BadLine):
                            _add_problem(problems, line)
        except InvalidRequestError as error:
            return InputFacts(), [LineProblem(code="too_many_requests", message=str(error))]
        if facts.num_requests == 0:
            problems.append(LineProblem(code="empty_file", message="the input has no requests"))
        return facts, problems

    @contextmanager
    def _results(self, facts: InputFacts) -> Iterator[_TwoFiles]:
        with ExitStack() as stack:
            opened = []
            for file_id in (self.record.output_id, self.record.error_id):
                file = ResultFile(self._store.content(file_id), facts.fingerprint)
                stack.callback(file.close)
                opened.append(file)
            output, errors = opened
            results = _TwoFiles(output, errors, self.record.owner, self._store, self._service.lines)
            self._note(results)
            yield results


def _add_problem(problems: list[LineProblem], line: BadLine) -> None:
    if len(problems) < MAX_PROBLEMS:
        problems.append(LineProblem(code=line.code, message=line.message, param=line.param, line=line.number))


class _TwoFiles:
    """Answers in one file, refusals and errors in the other."""

    def __init__(
        self, output: ResultFile, errors: ResultFile, owner: str, store: BatchStore, lines: Counter[str]
    ) -> None:
        self._output = output
        self._errors = errors
        self._owner = owner
        self._store = store
        self._lines = lines
        self._done = [output.counts.num_done, errors.counts.num_done]

    def counts(self) -> tuple[int, int]:
        """(completed, failed), of all runs."""
        return self._done[0], self._done[1]

    def is_done(self, number: int) -> bool:
        """As of `Results`."""
        return number in self._output.done or number in self._errors.done

    def add(self, number: int, line: bytes, *, is_completed: bool) -> None:
        """As of `Results`. Raises CapacityError: the directory is full."""
        file = self._output if is_completed else self._errors
        self._store.take_room(self._owner, len(line))
        try:
            file.append(line)
        except LoraserveError:
            self._store.give_room_back(self._owner, len(line))
            raise
        file.done.add(number)
        self._done[not is_completed] += 1
        self._lines["completed" if is_completed else "failed"] += 1

    def sync(self) -> None:
        """As of `Results`."""
        self._output.sync()
        self._errors.sync()


def batch_service(
    store: BatchStore, access: AccessControl, max_running: int, num_waiting: Callable[[], int]
) -> BatchService:
    """A service whose lines go behind all else that the engine and the access know of."""
    gate = BatchGate(max_running, num_waiting, lambda: access.num_running)
    return BatchService(store, access, gate)
