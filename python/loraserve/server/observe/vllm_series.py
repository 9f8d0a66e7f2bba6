"""The load of this moment under vLLM's names, as routers in front of several servers read it.

These are what the endpoint picker of the Gateway API inference extension, and llm-d's, score servers by:
https://github.com/kubernetes-sigs/gateway-api-inference-extension/tree/main/docs/proposals/003-model-server-protocol
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily, Metric

from loraserve.config import BLOCK_SIZE

if TYPE_CHECKING:
    from loraserve.engine.stats import AdapterStats, EngineStats

MAX_NAMES = 1024  # in one label; a name has up to 256 characters


def vllm_families(stats: EngineStats, model_name: str) -> Iterator[Metric]:
    """Queue, batch, KV cache and adapters, labelled with the name of the model."""
    usage = _kv_cache_usage(stats)
    for name, text, value in (
        ("num_requests_running", "Sequences in the batch", stats.num_running),
        ("num_requests_waiting", "Sequences that wait for their turn", stats.num_waiting),
        ("kv_cache_usage_perc", "Part of the pages that KV cache may have and running sequences use", usage),
        ("gpu_cache_usage_perc", "The same, by its older name", usage),
    ):
        gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
        gauge.add_metric([model_name], value)
        yield gauge
    cache = GaugeMetricFamily(
        "vllm:cache_config_info",
        "Tokens of a page, and pages of the pool that KV cache and adapters share",
        labels=["block_size", "num_gpu_blocks"],
    )
    cache.add_metric([str(BLOCK_SIZE), str(stats.num_pages)], 1)
    yield cache
    yield _adapters(stats)


def _kv_cache_usage(stats: EngineStats) -> float:
    """From 0 to 1; adapters in use leave the other pages, cached prompts and idle adapters give way."""
    in_use = sum(_num_pages(one, stats) for one in stats.adapters.values() if _is_in_use(one))
    in_use = min(in_use, stats.num_adapter_pages)  # names of one content share its pages
    return min(stats.num_kv_pages / max(stats.num_pages - in_use, 1), 1.0)


def _is_in_use(adapter: AdapterStats) -> bool:
    return adapter.state == "resident" and (adapter.is_pinned or adapter.num_running > 0)


def _num_pages(adapter: AdapterStats, stats: EngineStats) -> int:
    return -(-adapter.nbytes // stats.page_nbytes)


def _adapters(stats: EngineStats) -> Metric:
    """Names with commas between, those in use first; the value is when, in Unix seconds.

    A router holds a server that lists fewer names than `max_lora` for one that can take another adapter.
    """
    resident = [name for name, one in stats.adapters.items() if one.state == "resident"]
    resident.sort(key=lambda name: not _is_in_use(stats.adapters[name]))
    waiting = [
        name
        for name, one in stats.adapters.items()
        if one.state != "resident" and (one.num_waiting or one.state == "loading")
    ]
    largest = max((_num_pages(one, stats) for one in stats.adapters.values()), default=1)
    has_room_for = (stats.num_free_pages + stats.num_cached_pages) // max(largest, 1)
    family = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters in the memory pool, those that requests wait for, and how many the pool can hold",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    labels = [str(len(resident) + has_room_for), _listed(resident), _listed(waiting)]
    family.add_metric(labels, time.time())
    return family


def _listed(names: list[str]) -> str:
    return ",".join(names[:MAX_NAMES])
