"""`Group`: sums over ranks, and tensors from one to another; torch.distributed's gloo over the loopback."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

LOOPBACK = "127.0.0.1"


class LostRankError(Exception):
    """Another rank is gone, or takes no part."""


class Group:
    """One rank's end; not for several threads at once.

    A process group of its own: torch's default one stays the program's. Every method raises LostRankError.

    Args:
        rank: this process's.
        size: number of ranks.
        timeout_s: after which a rank that doesn't take part is given up.
    """

    def __init__(self, rank: int, size: int, timeout_s: float) -> None:
        self._rank = rank
        self._size = size
        self._timeout_s = timeout_s
        self._received: dict[int, torch.Tensor] = {}  # by rank
        self._group: Any = None  # torch's stubs say nothing of the class

    def connect(self, path: str) -> None:
        """Meet the other ranks, who find one another by a file at `path`; it may go once all have met."""
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=LOOPBACK)]
        options._timeout = timedelta(seconds=self._timeout_s)
        options._threads = 1
        with _together():
            store = dist.FileStore(path, self._size)  # type: ignore[attr-defined]
            self._group = gloo(store, self._rank, self._size, options)
            self._met.allreduce([torch.zeros(1)]).wait()

    @property
    def _met(self) -> Any:
        assert self._group is not None, "invariant: ranks meet before they compute"
        return self._group

    def all_reduce(self, address: int, count: int) -> None:
        """Replace `count` float32 at `address`, each rank's part, by their sum on every rank.

        Parts go to everyone and are added in the order of ranks, whatever their number: gloo's own all-reduce
        takes four times as long for a token, and its order depends on how much there is to add.
        """
        part = torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32)
        parts = [part if rank == self._rank else self._room(rank, count) for rank in range(self._size)]
        others = [(rank, other) for rank, other in enumerate(parts) if rank != self._rank]
        with _together():
            works = [self._met.send([part], rank, 0) for rank, _ in others]
            works += [self._met.recv([other], rank, 0) for rank, other in others]
            for work in works:
                work.wait()
        if self._size == 2:
            part += others[0][1]  # a sum of two has no order
            return
        total = parts[0].clone()
        for other in parts[1:]:
            total += other
        part.copy_(total)

    def _room(self, rank: int, count: int) -> torch.Tensor:
        """For what comes of a rank; kept, because fresh memory is cleared page by page."""
        kept = self._received.get(rank)
        if kept is None or kept.numel() < count:
            kept = self._received[rank] = torch.empty(count + count // 4, dtype=torch.float32)
        return kept[:count]

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        """To a rank that calls `receive`."""
        with _together():
            self._met.send([tensor], rank, 0).wait()

    def receive(self, tensor: torch.Tensor, rank: int) -> None:
        """Overwrite `tensor`, contiguous, by what `rank` sends."""
        with _together():
            self._met.recv([tensor], rank, 0).wait()

    def close(self) -> None:
        """Leave; safe to call twice."""
        self._group = None


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(str(error)) from error
