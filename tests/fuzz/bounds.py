"""What every file from outside is held to: read, or refused in one typed line, in time and within memory.

LORASERVE_TEST_FUZZ_CASES sets how many cases each test draws, LORASERVE_TEST_FUZZ_FIRST the number of the
first: a case's number is its seed, so that a finding is repeated by its number and one case.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from loraserve.errors import LoraserveError

NUM_CASES = int(os.environ.get("LORASERVE_TEST_FUZZ_CASES", "12"))
FIRST_CASE = int(os.environ.get("LORASERVE_TEST_FUZZ_FIRST", "0"))
LIMIT_S = 1.0  # of computing: the machine may have other things to do
HANGS_S = 60
LIMIT_NBYTES = 100 * 2**20
MAX_MESSAGE_CHARS = 4096
MAX_FINDINGS = 20


class Campaign:
    """Cases of one kind; `finish` fails with what was found, a place once."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._findings: dict[str, str] = {}
        self.num_read = 0
        self.num_refused = 0

    def cases(self) -> list[tuple[int, Random]]:
        """(number, its source of randomness) of each."""
        numbers = range(FIRST_CASE, FIRST_CASE + NUM_CASES)
        return [(number, Random(f"{self._kind} {number}")) for number in numbers]

    def check(self, number: int, read: Callable[[], Any]) -> None:
        """Runs one case, and notes what is wrong with how it ended."""
        _reset_peak()
        before, started = _rss_nbytes(), time.process_time()
        finding = self._outcome(read)
        spent, grown = time.process_time() - started, _peak_nbytes() - before
        if finding is None and spent > LIMIT_S:
            finding = "slow", f"took {spent:.1f} s of computing"
        if finding is None and grown > LIMIT_NBYTES:
            finding = "large", f"took {grown >> 20} MiB"
        if finding is not None:
            place, text = finding
            self._findings.setdefault(place, f"case {number} of {self._kind}: {text}")

    def finish(self, *, both: bool = True) -> None:
        """Fails with the findings, or where a test tests nothing: `both`, some are read and some refused."""
        shown = list(self._findings.values())[:MAX_FINDINGS]
        assert not shown, f"{len(self._findings)} findings\n\n" + "\n\n".join(shown)
        if both and NUM_CASES >= 100:
            assert self.num_read
            assert self.num_refused

    def _outcome(self, read: Callable[[], Any]) -> tuple[str, str] | None:
        """(place, text) of a finding."""
        previous = signal.signal(signal.SIGALRM, _hangs)
        signal.alarm(HANGS_S)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                read()
        except LoraserveError as error:
            self.num_refused += 1
            text = str(error)
            if text.isprintable() and 0 < len(text) <= MAX_MESSAGE_CHARS:
                return None
            return "message at " + _place(error), f"not one printable line: {text[:500]!r}\n{_trace(error)}"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic is no Exception
            return f"{type(error).__name__} at {_place(error)}", _trace(error)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
        self.num_read += 1
        return None


def _hangs(_signal: int, _frame: FrameType | None) -> None:
    raise TimeoutError(f"a case hangs for {HANGS_S} s")


def _place(error: BaseException) -> str:
    """The line of the package that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame for frame in frames if "loraserve" in frame.filename and "tests" not in frame.filename
    ] or frames
    return f"{own[-1].filename}:{own[-1].lineno}"


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error, limit=-4, chain=False))[:3000]


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _rss_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_nbytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
