"""`Placement`: which replica a request goes to, by adapter, prefix and load; knows nothing of Ray.

Each adapter has all replicas in an order of its own: rendezvous hashing, so that a replica that comes or
goes moves only its part of the adapters (Thaler and Ravishankar, 1998). Its homes are the first of them, one
for most adapters, as many as its part of the load fills for hot ones. A home that has much more to do than
the replicas on average passes its next request on to others, as in consistent hashing with bounded loads
(Mirrokni, Thorup and Zadimoghaddam, 2018): to the first in the order that has the adapter in memory, or else
to the one with least to do.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

HALF_LIFE_S = 30.0  # of what adapters have asked lately
HOME_PART = 0.75  # of a replica's part of the load that one home of an adapter is to carry
MAX_LOAD_RATIO = 1.5  # of a home, over the average
MIN_SLACK = 8.0  # requests by which a home may always exceed the average: a step takes that many at once
RANK_OF_A_REQUEST = 128  # whose LoRA products cost about what the request's others do
MAX_KNOWN = 65_536  # adapters whose part of the load is known
PREFIX_SPREAD = 2.0  # requests by which a replica that has the prefix may exceed the least loaded home


@dataclass(frozen=True)
class Placed:
    """What is placed.

    Args:
        adapters: names, the first decides; none is the base model.
        prefix: what prompts that begin alike have in common.
        rank: of all its adapters together.
    """

    adapters: tuple[str, ...] = ()
    prefix: bytes = b""
    rank: int = 0

    @property
    def cost(self) -> float:
        """In requests without an adapter."""
        return 1.0 + self.rank / RANK_OF_A_REQUEST


@dataclass
class _Lately:
    """Cost, worth half after `HALF_LIFE_S`."""

    cost: float
    at: float

    def add(self, cost: float, now: float) -> None:
        self.cost = self.worth(now) + cost
        self.at = now

    def worth(self, now: float) -> float:
        return self.cost * math.pow(0.5, (now - self.at) / HALF_LIFE_S)


class Placement:
    """Counts what is under way; on one thread.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._loads: dict[str, float] = {}
        self._lately: dict[str, _Lately] = {}
        self._all = _Lately(0.0, clock())

    def rank_replicas(
        self, placed: Placed, replicas: Collection[str], resident: Mapping[str, Collection[str]]
    ) -> list[str]:
        """All `replicas`, the best first; `resident` has the adapters in the memory of each."""
        if not replicas:
            return []
        key = placed.adapters[0] if placed.adapters else ""
        self._count(key, placed.cost)
        order = sorted(replicas, key=lambda one: _place(key, one), reverse=True)
        homes = order[: self._num_homes(key, len(order))]
        loads = {one: self._loads.get(one, 0.0) for one in order}
        home = self._home(homes, placed.prefix, loads)
        average = (sum(loads.values()) + placed.cost) / len(order)
        limit = max(MAX_LOAD_RATIO * average, average + MIN_SLACK)
        if loads[home] + placed.cost <= limit:
            first = home
        else:
            fitting = [one for one in order if loads[one] + placed.cost <= limit] or order
            wanted = set(placed.adapters)
            having = [one for one in fitting if wanted and wanted <= set(resident.get(one, ()))]
            first = having[0] if having else min(fitting, key=loads.__getitem__)
        return [first, *sorted((one for one in order if one != first), key=loads.__getitem__)]

    def begin(self, replica: str, cost: float) -> None:
        """A request is under way there."""
        self._loads[replica] = self._loads.get(replica, 0.0) + cost

    def end(self, replica: str, cost: float) -> None:
        """It has ended."""
        if replica in self._loads:
            self._loads[replica] = max(self._loads[replica] - cost, 0.0)

    def forget(self, replica: str) -> None:
        """A replica is gone, and what was under way there."""
        self._loads.pop(replica, None)

    def load(self, replica: str) -> float:
        """What is under way there, in requests without an adapter."""
        return self._loads.get(replica, 0.0)

    def _count(self, key: str, cost: float) -> None:
        now = self._clock()
        self._all.add(cost, now)
        lately = self._lately.pop(key, None) or _Lately(0.0, now)
        lately.add(cost, now)
        self._lately[key] = lately
        while len(self._lately) > MAX_KNOWN:
            del self._lately[next(iter(self._lately))]

    def _num_homes(self, key: str, num_replicas: int) -> int:
        """The base model is at home everywhere; an adapter where its part of the load is carried."""
        if not key:
            return num_replicas
        now = self._clock()
        part = self._lately[key].worth(now) / max(self._all.worth(now), 1e-9)
        is_known = self._all.worth(now) >= 4 * num_replicas  # of the first requests each is a large part
        return min(max(math.ceil(part * num_replicas / HOME_PART), 1), num_replicas) if is_known else 1

    @staticmethod
    def _home(homes: list[str], prefix: bytes, loads: Mapping[str, float]) -> str:
        """The one that has the prefix, unless another has clearly less to do."""
        least = min(loads[one] for one in homes)
        if not prefix:
            return next(one for one in homes if loads[one] == least)
        wanted = max(homes, key=lambda one: _place(prefix.hex(), one))
        return wanted if loads[wanted] <= least + PREFIX_SPREAD else min(homes, key=loads.__getitem__)


def _place(key: str, replica: str) -> int:
    digest = hashlib.blake2b(f"{key}\0{replica}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
