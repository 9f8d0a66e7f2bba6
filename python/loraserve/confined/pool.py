"""`ConfinedPool`: processes for one kind of work on what strangers give, beside the engine's own."""

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
from contextlib import suppress
from typing import Any

from loraserve.errors import CapacityError, OverloadedError

LENGTH_NBYTES = 8
ENCODING_ERRORS = "surrogatepass"  # whether text can be encoded is for its readers to say
NUM_PROCESSES = 2
WALL_LIMIT_S = 30.0  # on a machine that has other things to do
WAIT_LIMIT_S = 30.0  # for a process that is free
MAX_TEXT_NBYTES = 64 * 2**20
PIPE_NBYTES = 32 * 2**10  # a pipe takes that at once
START_CODE = (
    "import json, sys; from importlib import import_module; sys.path[:] = json.loads(sys.argv.pop()); "
    "import_module(sys.argv.pop()).main()"
)


class ConfinedError(Exception):
    """The work raised an error, whose text this has."""


class LimitError(ConfinedError):
    """The work went beyond a limit of its process; the message says which."""


class ConfinedPool:
    """Works from any thread; what fails or runs over takes its process with it, and the next is started.

    Args:
        module: its `main` is to call `worker.serve`.
        noun: what the work is about, in the plural, for messages.
        cpu_limit_s: seconds of a core that one piece of work may take.
        num_processes: pieces at once; each process is a Python of some 20 MB, started on need.
    """

    def __init__(
        self, module: str, noun: str, cpu_limit_s: float, num_processes: int = NUM_PROCESSES
    ) -> None:
        self._module = module
        self._noun = noun
        self._cpu_limit_s = cpu_limit_s
        self._free: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        for _ in range(num_processes):
            self._free.put(None)

    def ask(self, *arguments: Any) -> str:
        """What the work gives.

        Args:
            arguments: of the types of JSON, and tuples.

        Raises:
            ConfinedError: it can't be done, or (LimitError) not within the limits.
            OverloadedError: all processes were busy for too long.
            CapacityError: no process could be started.
        """
        request = marshal.dumps(arguments)
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
        if answer[:1] == b"!":
            raise LimitError(text)
        if answer[:1] == b"-":
            raise ConfinedError(text)
        return text

    def _take(self) -> _Process:
        try:
            process = self._free.get(timeout=WAIT_LIMIT_S)
        except queue.Empty:
            raise OverloadedError(
                f"all {self._noun} under way took over {WAIT_LIMIT_S:g} s, try again later",
                retry_after_s=WAIT_LIMIT_S,
                reason="busy",
            ) from None
        try:
            return process or self._start()
        except BaseException:
            self._free.put(None)
            raise

    def _start(self) -> _Process:
        try:
            return _Process(self._module, self._cpu_limit_s)
        except OSError as error:
            raise CapacityError(f"no process for {self._noun} could be started: {error}") from None


class _Process:
    """One process; used by one thread at a time."""

    def __init__(self, module: str, cpu_limit_s: float) -> None:
        self._cpu_limit_s = cpu_limit_s
        command = [sys.executable, "-c", START_CODE, str(cpu_limit_s), module, json.dumps(sys.path)]
        pipe = subprocess.PIPE
        self._popen = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        self.end = weakref.finalize(self, _end, self._popen)

    def ask(self, request: bytes) -> bytes:
        """The answer. Raises LimitError: there is none, and the process is of no more use."""
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
            raise LimitError(f"its text has {nbytes} bytes, the limit is {MAX_TEXT_NBYTES}")
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
                raise LimitError(f"it took longer than {WALL_LIMIT_S:g} s")
            chunk = os.read(stream.fileno(), min(nbytes - len(data), 2**20))
            if not chunk:
                raise LimitError(self._why_gone())
            data += chunk
        return bytes(data)

    def _why_gone(self) -> str:
        status = self._popen.wait()
        if status == -signal.SIGPROF:
            return f"it took longer than {self._cpu_limit_s:g} s of computing"
        if status == -signal.SIGABRT:  # how Rust ends where an allocation fails
            return "it takes more memory than its process may have"
        return f"its process ended with status {status}"


def _end(popen: subprocess.Popen[bytes]) -> None:
    popen.kill()
    for stream in (popen.stdin, popen.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()
    popen.wait()
