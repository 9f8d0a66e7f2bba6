"""`Ranks`: processes of the other ranks, as rank 0 starts them, tells them what to do, and misses them."""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch

from loraserve import _core
from loraserve.backends.tensor_parallel.channel import Channel, Message
from loraserve.errors import DeviceError

START_LIMIT_S = 600.0  # from its beginning until a rank has its weights
END_LIMIT_S = 2.0  # that a rank has to end by itself
PING_LIMIT_S = 1.0
MODULE = "loraserve.backends.tensor_parallel.worker"
START_CODE = (
    "import json, sys; from importlib import import_module; sys.path[:] = json.loads(sys.argv.pop()); "
    f"import_module({MODULE!r}).main()"
)


@dataclass(frozen=True)
class RankStart:
    """What a rank loads, and how it meets the others.

    `num_positions` bounds the rotary table, `meeting` is the path of the file that ranks find one another by,
    `timeout_s` as of `Group`.
    """

    model: str
    dtype: str
    rank: int
    size: int
    num_pages: int
    num_positions: int
    num_threads: int
    meeting: str
    timeout_s: float


@dataclass(frozen=True)
class LoadHead:
    """An adapter's part on its way to a rank: `fence` is the number of commands that come before it."""

    slot: int
    first_page: int
    nbytes: int
    fence: int


@dataclass(frozen=True)
class AdapterPart:
    """What a rank is to have in its extent."""

    layout: _core.AdapterLayout
    data: torch.Tensor  # uint8, as many bytes as the layout has


class _Rank:
    """One process: what it is to compute comes over `commands`, adapters over `loads`."""

    def __init__(self, rank: int, timeout_s: float) -> None:
        self.rank = rank
        own_ends, its_ends = zip(*(socket.socketpair() for _ in range(2)), strict=True)
        descriptors = [end.fileno() for end in its_ends]
        command = [sys.executable, "-c", START_CODE, *map(str, descriptors), json.dumps(sys.path)]
        try:
            self.popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=descriptors)
        finally:
            for end in its_ends:
                end.close()
        self.commands, self.loads = (Channel(end, timeout_s) for end in own_ends)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.popen.pid})"

    def why_gone(self) -> str | None:
        """What became of it, None if it runs."""
        text = self._last_words()
        status = self.popen.poll()
        if status is None and not text:
            return None
        how = "failed" if status is None else f"ended with status {status}"
        if status is not None and status < 0:
            how = f"was killed by signal {-status}"
        return f"{self} {how}{f': {text}' if text else ''}"

    def _last_words(self) -> str:
        """Why it can't go on, if it has said so."""
        try:
            if select.select([self.commands.connection], [], [], 0)[0]:
                kind, data = self.commands.receive(PING_LIMIT_S)
                return data.decode(errors="replace") if kind is Message.FAILED else ""
        except (OSError, EOFError, ValueError):
            pass
        return ""

    def answers(self) -> bool:
        """Whether it is alive enough to answer a ping."""
        try:
            self.loads.send(Message.PING)
            self.loads.expect(Message.DONE, PING_LIMIT_S)
        except (OSError, EOFError, ValueError):
            return False
        return True


class Ranks:
    """All but rank 0. Whatever happens to this process, they end with it, as its ends of the channels do.

    Args:
        size: of all ranks.
        timeout_s: after which one that doesn't answer is given up.
    """

    def __init__(self, size: int, timeout_s: float) -> None:
        self._size = size
        self._timeout_s = timeout_s
        self._ranks: list[_Rank] = []
        self._folder = tempfile.mkdtemp(prefix="loraserve-ranks-")
        self._num_commands = 0
        self._loads = threading.Lock()
        self._loss: DeviceError | None = None
        self._losses = threading.Lock()
        self._is_watched = threading.Event()
        self.end = weakref.finalize(self, _end, self._ranks, self._folder)

    @property
    def meeting(self) -> str:
        """Path of the file that ranks find one another by."""
        return os.path.join(self._folder, "meeting")

    def start(self, of_rank: Callable[[int], RankStart]) -> None:
        """Start the processes, which begin to load. Raises DeviceError."""
        try:
            for rank in range(1, self._size):
                self._ranks.append(_Rank(rank, self._timeout_s))
                self._ranks[-1].commands.send_json(Message.START, asdict(of_rank(rank)))
        except (OSError, EOFError) as error:
            raise self.lost(error) from error

    def wait_until_ready(self) -> None:
        """Until all have their weights. Raises DeviceError."""
        deadline = time.monotonic() + START_LIMIT_S
        for rank in self._ranks:
            try:
                rank.commands.expect(Message.READY, max(deadline - time.monotonic(), 1.0))
            except (OSError, EOFError) as error:
                raise self.lost(error, rank) from error

    def have_met(self) -> None:
        """The file that they found one another by is of no use any more."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def tell(self, kind: Message, *parts: bytes) -> None:
        """Have every rank do something, after what it was told before; on one thread. Raises DeviceError."""
        self.check()
        self._num_commands += 1
        for rank in self._ranks:
            try:
                rank.commands.send(kind, *parts)
            except OSError as error:
                raise self.lost(error, rank) from error

    def load(self, slot: int, first_page: int, parts: Sequence[AdapterPart]) -> None:
        """Bring to each rank its part of an adapter, and return when all have it; from any thread.

        They write it once they have done what they were told until now. Raises DeviceError.
        """
        fence = self._num_commands
        with self._loads:
            self.check()
            for rank, part in zip(self._ranks, parts, strict=True):
                head = LoadHead(slot, first_page, part.layout.nbytes, fence)
                try:
                    rank.loads.send_json(Message.LOAD, asdict(head))
                    rank.loads.send(Message.LOAD, part.layout.to_json())
                    rank.loads.send(Message.LOAD, part.data.numpy().data)
                except OSError as error:
                    raise self.lost(error, rank) from error
            for rank in self._ranks:
                try:
                    rank.loads.expect(Message.DONE)
                except (OSError, EOFError) as error:
                    raise self.lost(error, rank) from error

    def check(self) -> None:
        """Raises DeviceError: one was lost."""
        if self._loss is None and self._is_watched.is_set():
            self._loss = self.lost(EOFError("it ended"))
        if self._loss is not None:
            raise self._loss

    def watch(self, wake: Callable[[], None]) -> None:
        """Call `wake` once a rank ends, after which `check` raises."""
        connections = [rank.commands.connection for rank in self._ranks]
        arguments = (connections, self._is_watched, wake)
        threading.Thread(target=_watch, args=arguments, name="loraserve-ranks", daemon=True).start()

    def lost(self, error: BaseException, suspect: _Rank | None = None) -> DeviceError:
        """What to raise where `error` came of a rank that is gone or silent; all others are ended, too."""
        with self._losses:
            if self._loss is None:
                reason = self._why_lost(error, suspect)
                self._loss = DeviceError(
                    f"{reason}; the {self._size} ranks of tensor_parallel_size can't go on without it: "
                    "start again"
                )
                for rank in self._ranks:  # one that hangs or is stopped would not end by itself
                    rank.popen.kill()
                self.end()
            return self._loss

    def _why_lost(self, error: BaseException, suspect: _Rank | None) -> str:
        deadline = time.monotonic() + PING_LIMIT_S
        while True:  # a process that was killed takes a moment to be seen so
            for rank in self._ranks:
                reason = rank.why_gone()
                if reason is not None:
                    return reason
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        if suspect is None:
            silent = (rank for rank in self._ranks if not rank.answers())
            suspect = next(silent, None)
        if suspect is None:
            return f"ranks don't agree any more: {error}"
        return f"{suspect} did not answer: {error}"


def _watch(connections: list[socket.socket], is_lost: threading.Event, wake: Callable[[], None]) -> None:
    with suppress(OSError, ValueError):  # closed meanwhile
        select.select(connections, [], [])  # they say nothing but that they fail
    is_lost.set()
    wake()


def _end(ranks: list[_Rank], folder: str) -> None:
    for rank in ranks:
        rank.commands.close()
        rank.loads.close()
    deadline = time.monotonic() + END_LIMIT_S
    for rank in ranks:
        try:
            rank.popen.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            rank.popen.kill()
            rank.popen.wait()
    shutil.rmtree(folder, ignore_errors=True)
