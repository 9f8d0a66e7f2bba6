"""peft itself as the oracle: which modules it adapts, at which rank and scale."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve._core import AdapterLayout, BaseShape, check_adapter, load_adapter
from loraserve.errors import AdapterFormatError
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

from tests.peft_writer import llama_shape

NUM_LAYERS = 12
SHAPE = llama_shape(NUM_LAYERS, hidden=16, num_heads=4, num_kv_heads=2, head_dim=4, intermediate=24)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def save(path: Path, **fields: Any) -> Path:
    """Let peft make and save an adapter."""
    get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **fields)).save_pretrained(str(path))
    return path


def load(path: Path) -> AdapterLayout:
    shape = BaseShape(*SHAPE)
    receipt = check_adapter(str(path), shape, "float32", 64)
    extent = torch.empty(receipt.nbytes, dtype=torch.uint8)
    return load_adapter(str(path), shape, "float32", 64, receipt.hash, extent.data_ptr(), extent.numel())


def our_modules(layout: AdapterLayout) -> dict[str, tuple[int, float]]:
    """Path → (padded rank, scale)."""
    paths = {(group, out_offset): path for path, group, _, _, out_offset in SHAPE[1]}
    return {
        f"model.layers.{layer}.{paths[group, out_offset]}": (rank, scale)
        for layer, group, _, _, _, modules in layout.groups()
        for _, rank, _, out_offset, _, scale in modules
    }


def peft_modules(path: Path) -> dict[str, tuple[int, float]]:
    """The same from the adapter as peft loads it."""
    model = PeftModel.from_pretrained(tiny_llama(), str(path))
    return {
        name.removeprefix("base_model.model."): (-(-module.r["default"] // 8) * 8, module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 4, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj"]},
        {"r": 5, "lora_alpha": 7, "target_modules": ALL, "use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.layers\.1\d?\.(self_attn|mlp)\.(q|up)_proj"},
        {"target_modules": r".*layers\.(?!3\b)\d+\.self_attn\.(?:q|k)_proj"},
        {"target_modules": ["self_attn.q_proj", "model.layers.3.mlp.down_proj"]},
        {"target_modules": ALL, "exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]},
        {"target_modules": ALL, "exclude_modules": r".*\.mlp\..*"},
        {"target_modules": ["q_proj", "model.layers.2.mlp.up_proj"], "layers_to_transform": [0, 11]},
        {"target_modules": ALL, "layers_to_transform": 1},
        {"target_modules": ALL, "layers_to_transform": [1, 5], "layers_pattern": "layers"},
        {"target_modules": ALL, "layers_to_transform": [4], "layers_pattern": ["blocks", "layers"]},
        {"target_modules": ALL, "rank_pattern": {"q_proj": 3, "down_proj": 17}},
        {"target_modules": ALL, "rank_pattern": {"layers.1.self_attn.q_proj": 9, "q_proj": 17}},
        {"target_modules": ALL, "rank_pattern": {r"layers\.(1|3)\..*": 11, r"self_attn\.\w_proj": 3}},
        {"target_modules": ALL, "rank_pattern": {"model.layers.1.mlp.up_proj": 9, "up_proj": 33}},
        {"target_modules": ALL, "rank_pattern": {"q_proj|model.layers.1.mlp.up_proj": 12}},
        {"target_modules": ALL, "alpha_pattern": {r"layers\.\d\.mlp.up_proj": 48, "o_proj": 4, "up_proj": 1}},
        {
            "r": 6,
            "target_modules": ALL,
            "use_rslora": True,
            "rank_pattern": {r"(?<!1)1\.self_attn\.[qk]_proj": 10},
            "alpha_pattern": {r".*\.[qk]_proj": 3},
        },
    ],
)
def test_modules_ranks_and_scales_equal_pefts(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = save(tmp_path, **fields)
    ours, theirs = our_modules(load(path)), peft_modules(path)
    assert ours.keys() == theirs.keys()
    for key, (rank, scale) in ours.items():
        assert rank == theirs[key][0], key
        assert scale == pytest.approx(theirs[key][1], rel=1e-7), key


def test_patterns_that_peft_reorders_on_saving_are_refused(tmp_path: Path) -> None:
    """peft sorts the keys it saves, then takes the first match: it can't reload these ranks either."""
    patterns = {"q_proj": 17, "layers.1.self_attn.q_proj": 9}
    path = save(tmp_path, target_modules=["q_proj"], rank_pattern=patterns)
    with pytest.raises(
        AdapterFormatError, match=r"layers\.1\.self_attn\.q_proj: rank 17 in the tensors, 9 in"
    ):
        load(path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft_modules(path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:.*embedding layers")
@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        (
            {"modules_to_save": ["lm_head"]},
            "base_model.model.lm_head.weight: the base's weights are not at hand",
        ),
        ({"modules_to_save": ["o_proj"]}, "not supported yet: field 'modules_to_save'"),
        (
            {"trainable_token_indices": [1, 2]},
            "token_adapter.trainable_tokens_delta: the base's weights are not at hand",
        ),
        ({"layer_replication": [(0, 12), (0, 1)]}, "not supported yet: field 'layer_replication'"),
        (
            {"target_modules": ["embed_tokens"]},
            "base_model.model.model.embed_tokens.lora_embedding_A fits no module of the base model",
        ),
        ({"target_modules": ["lm_head"]}, "base_model.model.lm_head.lora_A.weight fits no module"),
    ],
)
def test_what_peft_saves_and_we_do_not_serve_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], fragment: str
) -> None:
    path = save(tmp_path, **({"target_modules": ["q_proj"]} | fields))
    with pytest.raises(AdapterFormatError) as error:
        load(path)
    assert fragment in str(error.value)
