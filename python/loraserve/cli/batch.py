"""`loraserve batch`: a file of requests in OpenAI's batch format, answered in this process or by a server."""

from __future__ import annotations

import argparse
import asyncio
import errno
import functools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from loraserve.cli.options import MODEL_HELP, Subparsers, add_command, add_model_options, engine_config
from loraserve.errors import BatchFileError, InvalidRequestError
from loraserve.validation.files import is_regular_file

if TYPE_CHECKING:
    from loraserve.server.batches.dispatch import Dispatcher
    from loraserve.server.batches.lines import InputFacts, UrlCheck
    from loraserve.server.batches.results import Counts, ResultFile

EXAMPLES = """\
  loraserve batch input.jsonl -o output.jsonl --model smollm2 --adapter sql=adapters/sql
  loraserve batch input.jsonl -o output.jsonl --url http://127.0.0.1:8000 --api-key-env MY_KEY
  cat input.jsonl | loraserve batch - -o - --model smollm2 > output.jsonl

A line of INPUT is a request in OpenAI's batch format; its model is the base model or an adapter:

  {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "sql",
   "messages": [{"role": "user", "content": "How many users are there?"}], "max_tokens": 64}}

(on one line). A line of OUTPUT is its result, in the order in which they are ready:

  {"id": "batch_req_…", "custom_id": "1", "response": {"status_code": 200, "request_id": "…", "body": {…}},
   "error": null}

A line that is no request gets an `error`, one that is refused the status and body of the refusal; neither
ends the run. Killed at any moment, the same command goes on: what OUTPUT holds is not run again.

exit status: 0 every line was answered, 3 some failed (OUTPUT says why), 1 the run could not go on, 2 wrong
usage, 130 stopped by Ctrl-C, 143 by SIGTERM. docs/batches.md has more.
"""

STDIO = "-"
EXIT_SOME_FAILED = 3
DEFAULT_CONCURRENCY = 64  # of a server
MAX_CONCURRENCY = 1024
SEQUENCES_AHEAD = 2  # times what a step holds: the queue is never empty
TTY_INTERVAL_S = 0.5
LOG_INTERVAL_S = 30.0


def add_parser(commands: Subparsers) -> None:
    """Add `batch` with the options of the engine."""
    parser = add_command(commands, "batch", "answer a file of requests, of any length", EXAMPLES)
    parser.add_argument("input", metavar="INPUT", help="file of requests, a JSON object a line; - is stdin")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUTPUT",
        help="file that results are appended to; - is stdout, from which no run goes on",
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--model", metavar="MODEL", help=f"answer in this process: {MODEL_HELP}")
    target.add_argument("--url", metavar="URL", help="let the server at URL answer, as http://127.0.0.1:8000")
    parser.add_argument(
        "--api-key-env", metavar="VARIABLE", help="with --url: the environment variable that has the API key"
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help=f"lines answered at once (default: {SEQUENCES_AHEAD} times --max-num-seqs, of a server "
        f"{DEFAULT_CONCURRENCY})",
    )
    parser.add_argument("--overwrite", action="store_true", help="begin anew, whatever OUTPUT holds")
    parser.add_argument("--quiet", action="store_true", help="show no progress and no summary")
    engine = parser.add_argument_group("engine, with --model")
    engine.add_argument(
        "--served-model-name",
        metavar="NAMES",
        help="what lines call the base model, commas between (default: MODEL)",
    )
    add_model_options(engine)
    parser.set_defaults(run=functools.partial(run, parser, engine._group_actions))


def run(
    parser: argparse.ArgumentParser, engine_options: list[argparse.Action], args: argparse.Namespace
) -> int:
    """Answer all lines; the exit status.

    Exits with a usage error if options contradict one another.

    Raises:
        LoraserveError: a file, the model or the server can't be used, or the run could not go on.
    """
    if args.concurrency is not None and not 1 <= args.concurrency <= MAX_CONCURRENCY:
        parser.error(f"--concurrency is {args.concurrency}, it must be from 1 to {MAX_CONCURRENCY}")
    if args.url is None and args.api_key_env is not None:
        parser.error("--api-key-env is for --url")
    if args.url is not None:
        for option in engine_options:
            if getattr(args, option.dest) != option.default:
                flag = option.option_strings[0]
                parser.error(f"{flag} is of a model in this process, leave it out with --url")
    if STDIO not in (args.input, args.output) and _is_same_file(args.input, args.output):
        parser.error("INPUT and OUTPUT are the same file")
    with _input(args.input) as file:
        return asyncio.run(_answer_all(parser, args, file))


def _is_same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


@contextmanager
def _input(name: str) -> Iterator[BinaryIO]:
    """The input, which is read twice: what comes by a pipe is kept in a file without a name."""

    if name == STDIO:
        with tempfile.TemporaryFile() as copy:
            try:
                shutil.copyfileobj(sys.stdin.buffer, copy)
                copy.seek(0)
            except OSError as error:
                where = tempfile.gettempdir()
                raise BatchFileError(
                    f"stdin can't be kept in {where}: {error.strerror}, choose another with TMPDIR"
                ) from error
            yield copy
        return
    if not is_regular_file(name):
        reason = "it is no file" if os.path.exists(name) else os.strerror(errno.ENOENT)
        raise BatchFileError(f"{name} can't be read: {reason}; a pipe is given as stdin, with - for INPUT")
    try:
        file = open(name, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise BatchFileError(f"{name} can't be read: {error.strerror}") from error
    with file:
        yield file


async def _answer_all(parser: argparse.ArgumentParser, args: argparse.Namespace, file: BinaryIO) -> int:
    from loraserve.server.batches import lines  # noqa: PLC0415 (imports torch)

    facts = lines.scan(file, lines.custom_id_of)
    file.seek(0)
    with _output(args, facts) as results:
        if results.counts.num_done >= facts.num_requests:
            return _end(args, facts, results, Started(results.counts.num_done), None)
        if args.url is not None:
            return await _by_server(args, file, facts, results)
        return await _in_process(parser, args, file, facts, results)


@contextmanager
def _output(args: argparse.Namespace, facts: InputFacts) -> Iterator[LineResults]:
    from loraserve.server.batches.results import ResultFile  # noqa: PLC0415 (imports torch)

    if args.output == STDIO:
        yield LineResults(None)
        return
    results = ResultFile(Path(args.output), facts.fingerprint, overwrites=args.overwrite)
    try:
        yield LineResults(results)
    finally:
        results.close()


async def _in_process(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    file: BinaryIO,
    facts: InputFacts,
    results: LineResults,
) -> int:
    from loraserve.cli.batch_engine import application  # noqa: PLC0415 (imports torch and fastapi)
    from loraserve.server.batches.dispatch import AppDispatcher, batch_urls  # noqa: PLC0415
    from loraserve.server.batches.lines import known_urls  # noqa: PLC0415

    config = engine_config(args, parser)
    served = tuple(name for name in (args.served_model_name or "").split(",") if name) or (args.model,)
    engine, app = application(config, served)
    try:
        check = known_urls(batch_urls(app.openapi()))
        concurrency = args.concurrency or min(SEQUENCES_AHEAD * config.max_num_seqs, MAX_CONCURRENCY)
        return await _run(args, file, facts, results, AppDispatcher(app), check, concurrency)
    finally:
        await engine.shutdown(0.0)


async def _by_server(
    args: argparse.Namespace, file: BinaryIO, facts: InputFacts, results: LineResults
) -> int:
    from loraserve.cli.batch_url import ServerDispatcher, check_url  # noqa: PLC0415 (imports fastapi)

    key = None
    if args.api_key_env is not None:
        key = os.environ.get(args.api_key_env)
        if not key:
            raise InvalidRequestError(f"the variable {args.api_key_env} of --api-key-env is not set")
    concurrency = args.concurrency or DEFAULT_CONCURRENCY
    server = ServerDispatcher(args.url, key, concurrency)
    try:
        await server.check()
        return await _run(args, file, facts, results, server, check_url, concurrency)
    finally:
        server.close()


async def _run(
    args: argparse.Namespace,
    file: BinaryIO,
    facts: InputFacts,
    results: LineResults,
    dispatcher: Dispatcher,
    check_url: UrlCheck,
    concurrency: int,
) -> int:
    from loraserve.server.batches.lines import read_lines  # noqa: PLC0415 (imports torch)
    from loraserve.server.batches.run import BatchRun, FixedSlots  # noqa: PLC0415

    started = Started(results.counts.num_done)
    counts = results.counts
    with _progress(args, facts, counts.num_done) as update:
        lines = read_lines(file, facts, check_url)
        slots = FixedSlots(concurrency)
        batch = BatchRun(facts.fingerprint, lines, dispatcher, results, slots, counts, update)
        with _stopping(batch.stop) as signals:
            await batch.run()
    return _end(args, facts, results, started, signals[0] if signals else None)


@contextmanager
def _stopping(stop: Callable[[], None]) -> Iterator[list[signal.Signals]]:
    """Signals that have come; the first stops the run, a second ends the process."""
    came: list[signal.Signals] = []
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if came:
            os._exit(128 + number)
        came.append(number)
        stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield came
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


@contextmanager
def _progress(args: argparse.Namespace, facts: InputFacts, num_done: int) -> Iterator[Callable[[], None]]:
    """To be called after each line: lines done, their rate and the time left, on stderr."""
    from tqdm import tqdm  # noqa: PLC0415

    interval_s = TTY_INTERVAL_S if sys.stderr.isatty() else LOG_INTERVAL_S
    with tqdm(
        total=facts.num_requests,
        initial=num_done,
        unit="line",
        disable=args.quiet,
        mininterval=interval_s,
        maxinterval=interval_s,
        file=sys.stderr,
    ) as bar:
        yield lambda: (bar.update(), None)[1]


class Started:
    """When a run began, and with how many lines done before."""

    def __init__(self, num_before: int) -> None:
        self.num_before = num_before
        self._at = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since then."""
        return time.monotonic() - self._at


def _end(
    args: argparse.Namespace,
    facts: InputFacts,
    results: LineResults,
    started: Started,
    stopped_by: signal.Signals | None,
) -> int:
    """Tells the summary; the exit status."""
    counts = results.counts
    num_left = facts.num_requests - counts.num_done
    if not args.quiet:
        print(summary(counts, num_left, started, args.output), file=sys.stderr)
        if stopped_by is not None:
            again = (
                "the same command goes on"
                if args.output != STDIO
                else "results on stdout can't be gone on from"
            )
            print(f"stopped by {stopped_by.name}: {again}", file=sys.stderr)
    if stopped_by is not None:
        return 128 + stopped_by
    return EXIT_SOME_FAILED if counts.failed else 0


def summary(counts: Counts, num_left: int, started: Started, output: str) -> str:
    """One line: what has become of all lines, and how fast those of this run were."""
    num_now = counts.num_done - started.num_before
    parts = [f"{counts.num_done} lines done: {counts.completed} answered, {counts.failed} failed"]
    if num_left:
        parts.append(f"{num_left} left")
    if started.num_before:
        parts.append(f"{started.num_before} of them before")
    tokens = counts.prompt_tokens + counts.completion_tokens
    if num_now:
        parts.append(
            f"{num_now / max(started.seconds, 1e-3):.1f} lines and "
            f"{counts.completion_tokens / max(started.seconds, 1e-3):.1f} output tokens a second"
        )
        parts.append(f"{tokens} tokens ({counts.completion_tokens} of answers)")
    where = "stdout" if output == STDIO else output
    return ", ".join(parts) + f"; {where}"


class LineResults:
    """All results in one file; on stdout where there is none."""

    def __init__(self, file: ResultFile | None) -> None:
        from loraserve.server.batches.results import Counts  # noqa: PLC0415 (imports torch)

        self._file = file
        self.counts = Counts() if file is None else file.counts

    def is_done(self, number: int) -> bool:
        """As of `Results`."""
        return self._file is not None and number in self._file.done

    def add(self, number: int, line: bytes, *, is_completed: bool) -> None:
        """As of `Results`."""
        if self._file is None:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        else:
            self._file.append(line)

    def sync(self) -> None:
        """As of `Results`."""
        if self._file is not None:
            self._file.sync()
