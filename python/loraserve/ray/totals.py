"""What replicas tell, added up."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from loraserve.engine.shadow import ShadowInfo, ShadowResults
from loraserve.engine.stats import (
    AdapterInfo,
    AdapterUsage,
    EngineInfo,
    EngineStats,
    FlowStats,
    HostTierStats,
)
from loraserve.engine.versions import GenerationInfo
from loraserve.errors import AdapterNotFoundError
from loraserve.ray.values import Entry, Pulse

OF_THE_FLEET = ("num_adapters",)  # every replica has the same ones
STATES = ("resident", "loading", "registered", "failed")  # of several replicas the first that one has


def _sums(values: Sequence[Any], *more: str, without: Iterable[str] = ()) -> dict[str, Any]:
    """Of the counts of plain values, and of `more` fields."""
    names = [field.name for field in fields(values[0]) if field.name.startswith("num_")]
    return {
        name: sum(getattr(one, name) for one in values) for name in (*names, *more) if name not in without
    }


def _tier(tiers: Sequence[HostTierStats]) -> HostTierStats:
    return HostTierStats(**_sums(tiers, "limit_nbytes", "nbytes"))


def total_info(pulses: Sequence[Pulse]) -> EngineInfo:
    """Settings of the first, counts of all together."""
    infos = [pulse.info for pulse in pulses]
    first = infos[0]
    return replace(
        first, **_sums(infos, without=OF_THE_FLEET), host_tier=_tier([one.host_tier for one in infos])
    )


def total_usage(usages: Sequence[AdapterUsage]) -> AdapterUsage:
    """Counts of all together."""
    return AdapterUsage(**_sums(usages, "shadow_agreement"))


def total_stats(entries: Sequence[Mapping[str, Entry]], pulses: Sequence[Pulse]) -> EngineStats:
    """Of pages, sequences, adapters and flows."""
    stats = [pulse.stats for pulse in pulses]
    first = stats[0]
    flows: dict[str, list[FlowStats]] = {}
    for one in stats:
        for flow in one.flows:
            flows.setdefault(flow.name, []).append(flow)
    return replace(
        first,
        **_sums(stats, without=OF_THE_FLEET),
        host_tier=_tier([one.host_tier for one in stats]),
        base=total_usage([one.base for one in stats]),
        adapters={info.name: info for info in total_adapters(entries)},
        flows=[_flow(same) for same in flows.values()],
        forgotten_tokens=(
            sum(one.forgotten_tokens[0] for one in stats),
            sum(one.forgotten_tokens[1] for one in stats),
        ),
    )


def _flow(flows: Sequence[FlowStats]) -> FlowStats:
    return replace(flows[0], **_sums(flows), lead=max(one.lead for one in flows))


def total_adapters(entries: Sequence[Mapping[str, Entry]]) -> list[AdapterInfo]:
    """Each once, in the order of the first replica; counts are those of all."""
    names = dict.fromkeys(name for one in entries for name in one)
    return [_adapter([one[name].info for one in entries if name in one]) for name in names]


def _adapter(infos: Sequence[AdapterInfo]) -> AdapterInfo:
    first = infos[0]
    states = {info.state for info in infos}
    last_s = [info.last_load_s for info in infos if info.last_load_s is not None]
    return replace(
        first,
        **_sums(infos),
        state=next((state for state in STATES if state in states), first.state),
        load_s=sum(info.load_s for info in infos),
        last_load_s=max(last_s, default=None),
        usage=total_usage([info.usage for info in infos]),
    )


def total_generations(name: str, entries: Sequence[Mapping[str, Entry]]) -> list[GenerationInfo]:
    """As the replica that remembers most has them, with the requests and shadows' results of all.

    Raises AdapterNotFoundError: there is no such adapter.
    """
    found = [one[name].generations for one in entries if name in one]
    if not found:
        raise AdapterNotFoundError(f"adapter {name!r} is not registered")
    longest = max(found, key=len)
    same: dict[int, list[GenerationInfo]] = {}
    for one in itertools.chain.from_iterable(found):
        same.setdefault(one.number, []).append(one)
    return [
        replace(
            one,
            num_requests=sum(other.num_requests for other in same[one.number]),
            shadow=_shadow([other.shadow for other in same[one.number] if other.shadow is not None]),
        )
        for one in longest
    ]


def _shadow(shadows: Sequence[ShadowInfo]) -> ShadowInfo | None:
    if not shadows:
        return None
    results = [shadow.results for shadow in shadows]
    total = ShadowResults(**_sums(results, "seconds", "shadow_seconds"))
    agreements = sum(one.agreement * one.num_compared for one in results)
    total.agreement = agreements / total.num_compared if total.num_compared else 1.0
    return ShadowInfo(fraction=shadows[0].fraction, results=total)
