"""What runs in a confined process: it reads requests from standard input until that ends, and answers them.

request: 8 bytes, its length; marshal of the arguments
answer:  8 bytes, its length; "+" and UTF-8 text, "-" and the error's text, or "!" and which limit was met
"""

from __future__ import annotations

import marshal
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from loraserve.confined.pool import ENCODING_ERRORS, LENGTH_NBYTES

MEMORY_NBYTES = 512 * 2**20  # beside what the process has at its start
NICE = 5  # whoever generates comes first, and others are answered nevertheless


def serve(work: Callable[..., str]) -> None:
    """Answers requests, whose arguments `work` gets; seconds of a core for each are the first argument."""
    cpu_limit_s = float(sys.argv[1])
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _restrict()
    while (request := read_message(requests)) is not None:
        # The default action of SIGPROF ends the process, inside a call of C as well.
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
        answer = _answer(work, marshal.loads(request))
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        write_message(answers, answer)


def read_message(stream: BinaryIO) -> bytes | None:
    """The next message, None where the stream ends."""
    head = stream.read(LENGTH_NBYTES)
    if len(head) < LENGTH_NBYTES:
        return None
    nbytes = int.from_bytes(head, "little")
    data = stream.read(nbytes)
    return data if len(data) == nbytes else None


def write_message(stream: BinaryIO, data: bytes) -> None:
    """As `read_message` reads it."""
    stream.write(len(data).to_bytes(LENGTH_NBYTES, "little"))
    stream.write(data)
    stream.flush()


def _restrict() -> None:
    with open("/proc/self/statm") as file:
        nbytes = int(file.read().split()[0]) * resource.getpagesize()
    limit = nbytes + MEMORY_NBYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for what in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(what, (0, 0))
    os.nice(NICE)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to the whole group; the owner decides


def _answer(work: Callable[..., str], arguments: tuple[Any, ...]) -> bytes:
    try:
        return b"+" + work(*arguments).encode(errors=ENCODING_ERRORS)
    except MemoryError:
        return f"!it takes more than {MEMORY_NBYTES >> 20} MiB of memory".encode()
    except Exception as error:  # what a stranger gives may raise anything
        return b"-" + str(error).encode(errors=ENCODING_ERRORS)
