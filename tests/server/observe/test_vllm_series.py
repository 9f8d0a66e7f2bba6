"""What routers read under vLLM's names, as the endpoint picker's extractor reads it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import pytest
from loraserve.engine.stats import AdapterStats, EngineStats
from loraserve.server.observe.metrics import Metrics
from loraserve.server.observe.prometheus import render
from loraserve.server.observe.vllm_series import MAX_NAMES
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.server.control_server import ControlEngine

PAGE_NBYTES = 65536


@dataclass
class Endpoint:
    """What the picker keeps of a server: pkg/epp/datalayer/metrics/extractor.go."""

    waiting: int
    running: int
    kv_cache_usage: float
    active_models: set[str]
    waiting_models: set[str]
    max_active_models: int
    updated_at: float
    block_size: int
    num_blocks: int


def extract(stats: EngineStats) -> Endpoint:
    engine = ControlEngine()
    text = render(Metrics(), engine.info(), stats).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}

    def latest(name: str) -> Sample:
        assert families[name].type == "gauge"
        (sample,) = families[name].samples
        return sample

    def names(listed: str) -> set[str]:
        return {name.strip() for name in listed.split(",") if name.strip()}

    lora, cache = latest("vllm:lora_requests_info"), latest("vllm:cache_config_info")
    usage = latest("vllm:kv_cache_usage_perc")
    assert usage.value == latest("vllm:gpu_cache_usage_perc").value
    assert usage.labels == {"model_name": "fake"}
    return Endpoint(
        waiting=int(latest("vllm:num_requests_waiting").value),
        running=int(latest("vllm:num_requests_running").value),
        kv_cache_usage=usage.value,
        active_models=names(lora.labels["running_lora_adapters"]),
        waiting_models=names(lora.labels["waiting_lora_adapters"]),
        max_active_models=int(lora.labels["max_lora"]),
        updated_at=lora.value,
        block_size=int(cache.labels["block_size"]),
        num_blocks=int(cache.labels["num_gpu_blocks"]),
    )


def adapter(state: str, **values: int | bool) -> AdapterStats:
    one = ControlEngine("a").stats().adapters["a"]
    return replace(
        one, **({"state": state, "num_running": 0, "num_waiting": 0, "nbytes": 2 * PAGE_NBYTES} | values)
    )


def pool(**adapters: AdapterStats) -> EngineStats:
    return replace(
        ControlEngine().stats(),
        num_pages=100,
        num_kv_pages=30,
        num_cached_pages=15,
        num_adapter_pages=40,
        num_free_pages=15,
        adapters=adapters,
    )


def test_the_picker_reads_queue_batch_and_cache() -> None:
    read = extract(pool())
    assert (read.waiting, read.running) == (6, 7)
    assert (read.block_size, read.num_blocks) == (16, 100)
    assert read.kv_cache_usage == pytest.approx(0.3)
    assert abs(read.updated_at - time.time()) < 60.0


def test_adapters_in_memory_run_and_those_that_load_wait() -> None:
    read = extract(
        pool(
            idle=adapter("resident"),
            busy=adapter("resident", num_running=2, num_waiting=1),
            loading=adapter("loading"),
            wanted=adapter("registered", num_waiting=1),
            elsewhere=adapter("registered"),
            broken=adapter("failed"),
        )
    )
    assert read.active_models == {"idle", "busy"}
    assert read.waiting_models == {"loading", "wanted"}


def test_there_is_room_for_as_many_of_the_largest_as_pages_can_be_had() -> None:
    read = extract(pool(a=adapter("resident"), b=adapter("registered", nbytes=7 * PAGE_NBYTES)))
    assert read.max_active_models == 1 + 30 // 7
    assert extract(pool()).max_active_models == 30


def test_cache_is_full_when_sequences_have_what_busy_and_pinned_adapters_leave() -> None:
    busy = adapter("resident", num_running=1, nbytes=20 * PAGE_NBYTES)
    pinned = adapter("resident", is_pinned=True, nbytes=20 * PAGE_NBYTES)
    idle = adapter("resident", nbytes=20 * PAGE_NBYTES)
    assert extract(pool(busy=busy, pinned=pinned)).kv_cache_usage == pytest.approx(30 / 60)
    assert extract(pool(busy=busy, idle=idle)).kv_cache_usage == pytest.approx(30 / 80)
    full = replace(pool(busy=busy, pinned=pinned), num_kv_pages=60)
    assert extract(full).kv_cache_usage == 1.0
    assert extract(pool(a=busy, b=busy, c=busy)).kv_cache_usage == pytest.approx(30 / 60), "of one content"


def test_a_label_names_a_bounded_number_of_adapters_those_in_use_first() -> None:
    many = {f"idle-{index}": adapter("resident") for index in range(2 * MAX_NAMES)}
    read = extract(pool(**many, busy=adapter("resident", num_running=1)))
    assert len(read.active_models) == MAX_NAMES
    assert "busy" in read.active_models
