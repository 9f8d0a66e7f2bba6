"""Which cores a replica computes on."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def pin_to_cores(place: int, num_cores: int) -> None:
    """Keep this process, with the threads that it has, on cores of its own, where there are enough.

    Args:
        place: of this replica among those of its machine, from 0.
        num_cores: of each of them.
    """
    allowed = sorted(os.sched_getaffinity(0))
    mine = allowed[place * num_cores : (place + 1) * num_cores]
    if len(mine) < num_cores:
        return  # as of a replica that is started before another one has gone
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), mine)
