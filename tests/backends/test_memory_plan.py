"""The default pool, the context it lets a request have, and what is refused before an abort."""

import logging
from typing import Any

import pytest
import torch
from loraserve.backends.machine_memory import DeviceMemory
from loraserve.backends.memory_plan import MemoryPlan, host_room, plan_host_tier, plan_pool
from loraserve.config import EngineConfig
from loraserve.errors import CapacityError
from loraserve.loader.packed_weights import DenseWeights
from loraserve.models.config import ModelConfig
from loraserve.models.ops import KvGeometry
from loraserve.models.weights import weights_nbytes

GIB = 2**30
LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "max_position_embeddings": 256,
}


def page_nbytes(model: ModelConfig, dtype: str = "bfloat16") -> int:
    return geometry(model).page_nbytes(getattr(torch, dtype))


def geometry(model: ModelConfig) -> KvGeometry:
    return KvGeometry(model.num_layers, model.num_heads, model.num_kv_heads, model.head_dim, 16)


def plan(shape: dict[str, Any], total: float, free: float, **settings: Any) -> MemoryPlan:
    """On a machine with so many GiB."""
    model = ModelConfig.from_hf(shape)
    memory = DeviceMemory(int(total * GIB), int(free * GIB), "this machine")
    config = EngineConfig(model="m", **settings)
    itemsize = getattr(torch, config.dtype).itemsize
    room = host_room(config, model, dense_nbytes(model, itemsize), memory)
    return plan_pool(config, model, geometry(model), room)


class NoTensors:
    """Nothing is read to know how large weights are."""

    def has(self, _name: str) -> bool:
        raise AssertionError

    def tensor(self, _name: str, _shape: tuple[int, ...]) -> torch.Tensor:
        raise AssertionError


def dense_nbytes(model: ModelConfig, itemsize: int = 2) -> int:
    """Of the weights in so many bytes each."""
    return weights_nbytes(model, DenseWeights(NoTensors()), itemsize)


@pytest.mark.parametrize(
    ("shape", "parameters"), [(LLAMA_3_8B, 8_030_261_248), (QWEN3_06B, 596_049_920)], ids=["8B", "0.6B"]
)
def test_weights_are_counted(shape: dict[str, Any], parameters: int) -> None:
    """Beside what the model cards say, norms are missing."""
    assert dense_nbytes(ModelConfig.from_hf(shape)) == pytest.approx(2 * parameters, rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "total", "free"),
    [(LLAMA_3_8B, 24, 22), (LLAMA_3_8B, 64, 60), (QWEN3_06B, 4, 3), (QWEN3_06B, 16, 12)],
)
def test_the_default_pool_leaves_room_for_the_weights_and_some_more(
    shape: dict[str, Any], total: float, free: float
) -> None:
    model = ModelConfig.from_hf(shape)
    found = plan(shape, total, free)
    pool = found.num_pages * page_nbytes(model)
    left = free * GIB - dense_nbytes(model)
    assert 0.3 * left < pool < 0.8 * left
    assert found.max_model_len == min(model.context_limit, found.num_pages * 16)


def test_the_default_pool_is_no_larger_than_its_requests_can_use() -> None:
    pool = plan(TINY, 512, 500).num_pages * page_nbytes(ModelConfig.from_hf(TINY))
    assert pool == 2 * GIB
    pool = plan(LLAMA_3_8B, 4096, 4000, max_num_seqs=1).num_pages * page_nbytes(
        ModelConfig.from_hf(LLAMA_3_8B)
    )
    assert pool == 2 * 131072 * page_nbytes(ModelConfig.from_hf(LLAMA_3_8B)) // 16


def test_the_context_is_what_one_request_can_have(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loraserve.backends.memory_plan")
    found = plan(LLAMA_3_8B, 64, 60, memory="2GiB")
    assert found.max_model_len == found.num_pages * 16 == 16384
    assert "context is cut from the model's 131072 tokens to the 16384 that the pool holds" in caplog.text
    assert "all would take 16.0 GiB" in caplog.text
    assert (
        "pool takes 2.0 GiB beside weights of 15.0 GiB and holds 16384 tokens of KV cache or" in caplog.text
    )
    assert "or 25 adapters of rank 16 on all modules; context 16384 tokens" in caplog.text
    assert plan(LLAMA_3_8B, 64, 60, memory="16GiB").max_model_len == 131072
    assert plan(LLAMA_3_8B, 64, 60, memory="2GiB", max_model_len=8192).max_model_len == 8192


@pytest.mark.parametrize("free", [3, 12, 100])
@pytest.mark.parametrize("memory", ["1GiB", "auto"])
@pytest.mark.parametrize("tier", ["0", "512MiB", "auto"])
def test_weights_pool_and_host_tier_are_together_within_what_is_free(
    free: float, memory: str, tier: str
) -> None:
    model = ModelConfig.from_hf(QWEN3_06B)
    config = EngineConfig(model="m", memory=memory, adapter_host_memory=tier)
    machine = DeviceMemory(128 * GIB, int(free * GIB), "this machine")
    room = host_room(config, model, dense_nbytes(model), machine)
    pool = plan_pool(config, model, geometry(model), room).num_pages * page_nbytes(model)
    nbytes = plan_host_tier(config, room.free - pool)
    assert dense_nbytes(model) + pool + nbytes < free * GIB
    if tier == "auto":
        assert 0.2 * (room.free - pool) < nbytes < 0.6 * (room.free - pool)
    else:
        assert nbytes == (0 if tier == "0" else GIB // 2)


def test_a_pool_beyond_what_is_free_leaves_no_host_tier() -> None:
    model, config = ModelConfig.from_hf(QWEN3_06B), EngineConfig(model="m", memory="8GiB")
    room = host_room(config, model, dense_nbytes(model), DeviceMemory(16 * GIB, 4 * GIB, "this machine"))
    assert plan_host_tier(config, room.free - 8 * GIB) == 0


REFUSED: list[tuple[dict[str, Any], float, float, dict[str, Any], str]] = [
    (
        LLAMA_3_8B,
        16,
        15,
        {},
        "model m takes 15.0 GiB of weights and .* this machine has 15.0 GiB",
    ),
    (LLAMA_3_8B, 32, 20, {"dtype": "float32"}, "takes 29.9 GiB of weights"),
    (
        LLAMA_3_8B,
        16,
        15,
        {"memory": "1MiB"},
        "free some, raise the limit, quantise it .* or take a smaller model",
    ),
    (
        QWEN3_06B,
        16,
        12,
        {"memory": "500GiB"},
        r"memory is \d+ bytes \(500.0 GiB\), this machine with 16.0 GiB can't give that",
    ),
    (QWEN3_06B, 16, 12, {"memory": "15GiB"}, "beside weights of 1.1 GiB there is room for 14.9 GiB"),
    (
        QWEN3_06B,
        16,
        12,
        {"adapter_host_memory": "11GiB"},
        r"adapter_host_memory is \d+ bytes \(11.0 GiB\), this machine, beside weights of 1.1 GiB, has "
        r"10\.\d GiB "
        "free: lower it, or leave it at auto",
    ),
    (
        QWEN3_06B,
        16,
        12,
        {"adapter_host_memory": "4GiB", "memory": "12GiB"},
        "beside weights of 1.1 GiB and adapter_host_memory of 4.0 GiB there is room for 10.9 GiB",
    ),
    (QWEN3_06B, 16, 12, {"memory": "2MiB"}, "memory is 2097152 bytes, this model needs at least 3670016"),
    (
        QWEN3_06B,
        16,
        12,
        {"memory": "1GiB", "max_model_len": 16384},
        r"max_model_len is 16384, the pool holds 9360 tokens: raise memory to 1879048192 bytes \(1.8 GiB\)",
    ),
]


@pytest.mark.parametrize(("shape", "total", "free", "settings", "message"), REFUSED)
def test_what_cannot_be_had_is_refused_with_the_remedy(
    shape: dict[str, Any], total: float, free: float, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CapacityError, match=message):
        plan(shape, total, free, **settings)


def test_more_than_is_free_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    plan(QWEN3_06B, 16, 4, memory="8GiB")
    assert "memory is 8.0 GiB, only" in caplog.text


def test_a_context_cut_by_a_sliding_window_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert plan({**TINY, "sliding_window": 64}, total=8, free=8).max_model_len == 64
    assert "from the model's 256 tokens to its sliding_window of 64" in caplog.text
