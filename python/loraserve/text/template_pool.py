"""`TemplatePool`: processes that render templates, so that none holds up or fills the engine's own."""

from __future__ import annotations

import json
import marshal
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any

from loraserve.errors import CapacityError, OverloadedError

LENGTH_NBYTES = 8
ENCODING_ERRORS = "surrogatepass"  # whether text can be encoded is for the tokenizer to say
NUM_PROCESSES = 2
CPU_LIMIT_S = 5.0  # of one text; templates of models take milliseconds
WALL_LIMIT_S = 30.0  # on a machine that has other things to do
WAIT_LIMIT_S = 30.0  # for a process that is free
MAX_TEXT_NBYTES = 64 * 2**20
PIPE_NBYTES = 32 * 2**10  # a pipe takes that at once
START_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
    "from loraserve.text.template_worker import main; main()"
)


class TemplateFailedError(Exception):
    """A template raised an error, or went beyond a limit; the message says which."""


class TemplatePool:
    """Renders from any thread; what fails or runs over takes its process with it, and the next is started.

    Args:
        num_processes: texts that can be rendered at once; each is a Python of some 20 MB, started on need.
        cpu_limit_s: seconds of a core that one text may take.
    """

    def __init__(self, num_processes: int = NUM_PROCESSES, cpu_limit_s: float = CPU_LIMIT_S) -> None:
        self._cpu_limit_s = cpu_limit_s
        self._free: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        for _ in range(num_processes):
            self._free.put(None)

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The text of a template.

        Args:
            source: the template.
            variables: of the types of JSON, and tuples.

        Raises:
            TemplateFailedError: it can't be rendered within the limits.
            OverloadedError: all processes were busy for too long.
        """
        return self._ask("render", source, variables)

    def names(self, source: str) -> frozenset[str]:
        """Names of variables that a template reads and does not set. Raises as `render` does."""
        return frozenset(self._ask("names", source, {}).split())

    def _ask(self, what: str, source: str, variables: Mapping[str, Any]) -> str:
        request = marshal.dumps((what, source, dict(variables)))
        process = self._take()
        answer: bytes | None = None
        try:
            answer = process.ask(request)
        finally:
            if answer is None:
                process.end()
                self._free.put(None)
            else:
                self._free.put(process)
        text = answer[1:].decode(errors=ENCODING_ERRORS)
        if answer[:1] == b"-":
            raise TemplateFailedError(text)
        return text

    def _take(self) -> _Process:
        try:
            process = self._free.get(timeout=WAIT_LIMIT_S)
        except queue.Empty:
            raise OverloadedError(
                f"all chat templates under way took over {WAIT_LIMIT_S:g} s, try again later",
                retry_after_s=WAIT_LIMIT_S,
                reason="busy",
            ) from None
        try:
            return process or _Process(self._cpu_limit_s)
        except BaseException:
            self._free.put(None)
            raise


class _Process:
    """One process; used by one thread at a time."""

    def __init__(self, cpu_limit_s: float) -> None:
        self._cpu_limit_s = cpu_limit_s
        command = [sys.executable, "-c", START_CODE, str(cpu_limit_s), json.dumps(sys.path)]
        pipe = subprocess.PIPE
        try:
            self._popen = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        except OSError as error:
            raise CapacityError(f"no process for chat templates could be started: {error}") from None
        self.end = weakref.finalize(self, _end, self._popen)

    def ask(self, request: bytes) -> bytes:
        """The answer. Raises TemplateFailedError: there is none, and the process is of no more use."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        deadline = time.monotonic() + WALL_LIMIT_S
        message = len(request).to_bytes(LENGTH_NBYTES, "little") + request
        writer = threading.Thread(target=self._write, args=(message,), daemon=True)
        if len(message) <= PIPE_NBYTES:
            self._write(message)
        else:  # the process may be gone before it has taken everything in
            writer.start()
        nbytes = int.from_bytes(self._read(LENGTH_NBYTES, deadline), "little")
        if nbytes > MAX_TEXT_NBYTES:
            raise TemplateFailedError(f"its text has {nbytes} bytes, the limit is {MAX_TEXT_NBYTES}")
        answer = self._read(nbytes, deadline)
        if writer.is_alive():
            writer.join()
        return answer

    def _write(self, message: bytes) -> None:
        assert self._popen.stdin is not None
        with suppress(OSError, ValueError):  # the process is gone, which the reader finds out
            self._popen.stdin.write(message)
            self._popen.stdin.flush()

    def _read(self, nbytes: int, deadline: float) -> bytes:
        stream = self._popen.stdout
        assert stream is not None
        data = bytearray()
        while len(data) < nbytes:
            left_s = deadline - time.monotonic()
            if left_s <= 0.0 or not select.select([stream], [], [], left_s)[0]:
                raise TemplateFailedError(f"it took longer than {WALL_LIMIT_S:g} s")
            chunk = os.read(stream.fileno(), min(nbytes - len(data), 2**20))
            if not chunk:
                raise TemplateFailedError(self._why_gone())
            data += chunk
        return bytes(data)

    def _why_gone(self) -> str:
        status = self._popen.wait()
        if status == -signal.SIGPROF:
            return f"it took longer than {self._cpu_limit_s:g} s of computing"
        return f"its process ended with status {status}"


def _end(popen: subprocess.Popen[bytes]) -> None:
    popen.kill()
    for stream in (popen.stdin, popen.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()
    popen.wait()


@cache
def _pool_of(_pid: int) -> TemplatePool:
    return TemplatePool()


def shared_pool() -> TemplatePool:
    """The processes of this process; a forked child has others."""
    return _pool_of(os.getpid())
