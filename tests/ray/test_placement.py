"""Where requests go: adapters have homes, hot ones several, and no replica has much more than others."""

from __future__ import annotations

import heapq
import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from loraserve.ray.placement import Placed, Placement
from loraserve.ray.prefix import prefix_of
from loraserve.request import GenerateRequest

REPLICAS = [f"replica-{index}" for index in range(8)]
NUM_ADAPTERS = 1000
POOL = 100  # adapters that a replica holds
REQUEST_S = 2.0
UNDER_WAY = 16  # of each replica, on average


@dataclass
class Fleet:
    """Requests by Zipf's law, of a length at random, over replicas that hold the adapters used last."""

    hit_rate: float
    most_served: float  # over the average of all replicas
    most_under_way: float  # more than the average


def simulate(choose: Callable[[Placement, Placed, dict[str, OrderedDict[str, None]]], str]) -> Fleet:
    generator, now = random.Random(7), 0.0
    names = [f"adapter-{index}" for index in range(NUM_ADAPTERS)]
    weights = [(index + 1) ** -1.2 for index in range(NUM_ADAPTERS)]
    placement = Placement(lambda: now)
    pools: dict[str, OrderedDict[str, None]] = {replica: OrderedDict() for replica in REPLICAS}
    ends: list[tuple[float, str]] = []
    num_hits = num_counted = 0
    served: Counter[str] = Counter()
    most = 0.0
    cost = Placed(rank=16).cost
    for index in range(24_000):
        now += generator.expovariate(UNDER_WAY * len(REPLICAS) / REQUEST_S)
        while ends and ends[0][0] <= now:
            placement.end(heapq.heappop(ends)[1], cost)
        name = generator.choices(names, weights)[0]
        replica = choose(placement, Placed((name,), rank=16), pools)
        placement.begin(replica, cost)
        heapq.heappush(ends, (now + generator.expovariate(1 / REQUEST_S), replica))
        pool = pools[replica]
        if index >= 6_000:
            num_counted += 1
            num_hits += name in pool
            served[replica] += 1
            loads = [placement.load(one) / cost for one in REPLICAS]
            most = max(most, max(loads) - sum(loads) / len(loads))
        pool.pop(name, None)
        pool[name] = None
        if len(pool) > POOL:
            pool.popitem(last=False)
    average = num_counted / len(REPLICAS)
    return Fleet(num_hits / num_counted, max(served.values()) / average, most)


def test_adapters_are_found_in_memory_and_load_is_even() -> None:
    turns = iter(range(10**6))
    placed = simulate(lambda placement, one, pools: placement.rank_replicas(one, REPLICAS, pools)[0])
    in_turn = simulate(lambda *_: REPLICAS[next(turns) % len(REPLICAS)])
    assert placed.hit_rate >= 0.95
    assert in_turn.hit_rate <= 0.8
    assert placed.most_served <= 1.5
    assert placed.most_under_way <= in_turn.most_under_way


def test_a_cold_adapter_has_one_home_and_keeps_it_when_another_replica_goes() -> None:
    placement = Placement(lambda: 0.0)
    homes = {f"a{n}": placement.rank_replicas(Placed((f"a{n}",)), REPLICAS, {})[0] for n in range(200)}
    assert len(set(homes.values())) == len(REPLICAS)
    left = REPLICAS[1:]
    for name, home in homes.items():
        again = placement.rank_replicas(Placed((name,)), left, {})[0]
        assert again == home or home == REPLICAS[0]


def test_a_hot_adapter_spreads_and_cold_ones_stay() -> None:
    placement = Placement(lambda: 0.0)
    went: Counter[str] = Counter()
    for turn in range(400):
        for name in ("hot", "hot", "hot", f"cold-{turn % 20}"):
            replica = placement.rank_replicas(Placed((name,)), REPLICAS[:4], {})[0]
            placement.begin(replica, 1.0)
            went[f"{name} {replica}"] += 1
            if sum(placement.load(one) for one in REPLICAS[:4]) > 32:
                for one in REPLICAS[:4]:
                    placement.end(one, 8.0)
    assert len([one for one in went if one.startswith("hot ")]) == 4
    cold = Counter(one.split()[0] for one in went if one.startswith("cold"))
    assert sum(cold.values()) <= 1.25 * len(cold), "nearly all have one home"


def test_a_home_that_is_overloaded_passes_on_to_who_has_the_adapter() -> None:
    placement = Placement(lambda: 0.0)
    order = placement.rank_replicas(Placed(("a",)), REPLICAS, {})
    for _ in range(40):
        placement.begin(order[0], 1.0)
    has_it = REPLICAS[3] if order[0] != REPLICAS[3] else REPLICAS[4]
    assert placement.rank_replicas(Placed(("a",)), REPLICAS, {has_it: {"a"}})[0] == has_it
    placement.forget(order[0])
    assert placement.rank_replicas(Placed(("a",)), REPLICAS, {})[0] == order[0]


def test_rank_counts() -> None:
    placement = Placement(lambda: 0.0)
    for _ in range(3):
        placement.begin("small", Placed(("a",), rank=8).cost)
        placement.begin("large", Placed(("b",), rank=256).cost)
    assert placement.rank_replicas(Placed(), ["large", "small"], {})[0] == "small"


def test_prompts_that_begin_alike_meet_while_loads_are_alike() -> None:
    placement = Placement(lambda: 0.0)
    system = {"role": "system", "content": "You are a pirate. " * 40}
    keys = {
        prefix_of(GenerateRequest(messages=[system, {"role": "user", "content": f"question {index}"}]))
        for index in range(20)
    }
    assert len(keys) == 1
    (prefix,) = keys
    first = placement.rank_replicas(Placed(prefix=prefix), REPLICAS, {})[0]
    placement.begin(first, 1.0)
    assert placement.rank_replicas(Placed(prefix=prefix), REPLICAS, {})[0] == first
    placement.begin(first, 5.0)
    assert placement.rank_replicas(Placed(prefix=prefix), REPLICAS, {})[0] != first


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (GenerateRequest(prompt="a"), GenerateRequest(prompt="b")),
        (GenerateRequest(prompt="a"), GenerateRequest(prompt="a", tenant="b")),
        (GenerateRequest(prompt="a"), GenerateRequest(prompt="a", cache_salt="b")),
        (GenerateRequest(prompt=[1, 2]), GenerateRequest(prompt=[1, 3])),
    ],
)
def test_prompts_that_share_no_cache_have_nothing_in_common(
    one: GenerateRequest, other: GenerateRequest
) -> None:
    assert prefix_of(one) != prefix_of(other)
    assert prefix_of(one) == prefix_of(one)
