"""`Group`: sums over ranks, and tensors from one to another; torch.distributed's gloo over the loopback."""

from __future__ import annotations

import ctypes
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

LOOPBACK = "127.0.0.1"


class Group:
    """One rank's end; not for several threads at once.

    A process group of its own: torch's default one stays the program's. What goes wrong raises RuntimeError.

    Args:
        rank: this process's.
        size: number of ranks.
        timeout_s: after which a rank that doesn't take part is given up.
    """

    def __init__(self, rank: int, size: int, timeout_s: float) -> None:
        self._rank = rank
        self._size = size
        self._timeout_s = timeout_s
        self._group: Any = None  # torch's stubs say nothing of the class

    def connect(self, path: str) -> None:
        """Meet the other ranks, who find one another by a file at `path`; it may go once all have met."""
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=LOOPBACK)]
        options._timeout = timedelta(seconds=self._timeout_s)
        options._threads = 1
        store = dist.FileStore(path, self._size)  # type: ignore[attr-defined]
        self._group = gloo(store, self._rank, self._size, options)
        self._met.allreduce([torch.zeros(1)]).wait()

    @property
    def _met(self) -> Any:
        assert self._group is not None, "invariant: ranks meet before they compute"
        return self._group

    def all_reduce(self, address: int, count: int) -> None:
        """Replace `count` float32 at `address`, each rank's part, by their sum on every rank."""
        part = torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32)
        self._met.allreduce([part]).wait()

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        """To a rank that calls `receive`."""
        self._met.send([tensor], rank, 0).wait()

    def receive(self, tensor: torch.Tensor, rank: int) -> None:
        """Overwrite `tensor`, contiguous, by what `rank` sends."""
        self._met.recv([tensor], rank, 0).wait()

    def close(self) -> None:
        """Leave; safe to call twice."""
        self._group = None
