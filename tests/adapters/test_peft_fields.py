"""Every field of the installed PEFT's LoraConfig, from the class itself: exact, or refused by its name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve._core import BaseShape, check_adapter, row_digests
from loraserve.errors import AdapterFormatError
from peft import LoraConfig, PeftModel, PeftType, get_peft_model

from tests.adapters.test_matches_peft import ALL, SHAPE, our_modules, peft_modules, tiny_llama
from tests.adapters.test_matches_peft import load as load_packed

# Values that PEFT saves and reloads: modules, ranks and scales are then its own.
EXACT: dict[str, list[Any]] = {
    "alora_invocation_tokens": [None, [], [1, 2]],  # where it acts: tests/e2e/test_alora.py
    "alpha_pattern": [{}, {"q_proj": 3}],
    "auto_mapping": [None],
    "base_model_name_or_path": [None, "some/base"],
    "corda_config": [None],
    "ensure_weight_tying": [False, True],
    "eva_config": [None],
    "exclude_modules": [None, ["k_proj"], r".*\.mlp\..*"],
    "inference_mode": [False, True],
    "init_lora_weights": [True, False, "gaussian", "orthogonal", "eva", "mica", "lora_ga"],
    "layers_pattern": [None, "layers", ["layers"]],
    "layers_to_transform": [None, 1, [0, 2]],
    "loftq_config": [{}],
    "lora_alpha": [1, 7, 16],
    "lora_dropout": [0.0, 0.1],
    "lora_ga_config": [None],
    "megatron_core": ["megatron.core"],
    "modules_to_save": [None],
    "peft_type": [PeftType.LORA],
    "peft_version": [None],
    "qalora_group_size": [16],
    "r": [2, 12],
    "rank_pattern": [{}, {"v_proj": 3}],
    "revision": [None, "main"],
    "runtime_config": [None],
    "target_modules": [ALL, "all-linear", r".*\.(q|up)_proj"],
    "task_type": [None, "CAUSAL_LM"],
    "use_rslora": [False, True],
}
# Served as well; what is computed is compared with PEFT elsewhere, since it takes the base's weights.
ON_A_BASE: dict[str, list[Any]] = {
    "bias": ["none", "all", "lora_only"],
    "lora_bias": [False, True],
    "use_dora": [False, True],
}
# Served as well; rows are compared with the base's.
ON_TABLES: dict[str, list[Any]] = {
    "modules_to_save": [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]],
    "trainable_token_indices": [None, [5, 3], {"embed_tokens": [1], "lm_head": [7, 2]}],
}
# Other values, as adapter_config.json has them, and words of the refusal beside the field's name.
REFUSED: dict[str, tuple[Any, str]] = {
    "arrow_config": ({"top_k": 3}, "not supported yet"),
    "fan_in_fan_out": (True, "not supported yet"),
    "init_lora_weights": ("pissa", "path_initial_model_for_weight_conversion"),
    "kasa_config": ({"beta": 1.0}, "not supported yet"),
    "layer_replication": ([[0, 2]], "merge the adapter"),
    "megatron_config": ({"a": 1}, "not supported yet"),
    "modules_to_save": (["o_proj"], "only embed_tokens, lm_head, norms, score and classifier"),
    "monteclora_config": ({"a": 1}, "not supported yet"),
    "peft_type": ("VERA", "train a LORA adapter"),
    "target_parameters": (["experts.gate_up_proj"], "name linear layers"),
    "trainable_token_indices": ({"norm": [1]}, "expected embed_tokens or lm_head"),
    "use_bdlora": ({"nblocks": 2}, "not supported yet"),
    "use_qalora": (True, "not supported yet"),
    "velora_config": ({"a": 1}, "not supported yet"),
}
FIELDS = sorted(field.name for field in dataclasses.fields(LoraConfig))


def save(path: Path, fields: dict[str, Any]) -> Path:
    """An adapter that PEFT makes and saves, with weights that aren't zero."""
    options: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]} | fields
    if fields.get("layers_pattern"):
        options["layers_to_transform"] = [1]
    runtime = {
        name: options.pop(name) for name in ("runtime_config", "peft_type", "peft_version") if name in options
    }
    torch.manual_seed(0)
    config = LoraConfig(**options)
    for name, value in runtime.items():
        if value is not None:
            setattr(config, name, value)
    model = get_peft_model(tiny_llama(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(path))
    return path


def test_every_field_of_lora_config_is_known() -> None:
    known = EXACT.keys() | ON_A_BASE.keys() | ON_TABLES.keys() | REFUSED.keys()
    assert set(FIELDS) == known, "a field of PEFT's that nobody looked at: serve it exactly or refuse it"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field in sorted(EXACT) for value in EXACT[field]],
    ids=str,
)
def test_a_field_that_is_served_is_pefts(tmp_path: Path, field: str, value: Any) -> None:
    path = save(tmp_path, {field: value})
    ours, theirs = our_modules(load_packed(path)), peft_modules(path)
    assert ours.keys() == theirs.keys()
    for key, (rank, scale) in ours.items():
        assert rank == theirs[key][0], key
        assert scale == pytest.approx(theirs[key][1], rel=1e-7), key


@pytest.mark.filterwarnings("ignore:Adapter .* invalid shape")
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers")
@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field in ON_A_BASE for value in ON_A_BASE[field]], ids=str
)
def test_a_field_that_takes_the_base_to_compute_is_served(tmp_path: Path, field: str, value: Any) -> None:
    receipt = check_adapter(str(save(tmp_path, {field: value})), BaseShape(*SHAPE), "float32", 64)
    assert receipt.modules == ["q_proj", "v_proj"]
    e2e = Path(__file__).parents[1] / "e2e/test_dora_and_biases.py"
    assert field in e2e.read_text(), "its answers are compared with PEFT's"


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field in ON_TABLES for value in ON_TABLES[field]], ids=str
)
def test_a_field_that_brings_rows_is_served(tmp_path: Path, field: str, value: Any) -> None:
    model = tiny_llama()
    tables = {"embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}

    def stored(module: str) -> tuple[tuple[int, int], bytes, bool]:
        weight = torch.zeros_like(tables[module].weight)
        rows, columns = weight.shape
        return (rows, columns), row_digests(weight.data_ptr(), weight.nbytes, 4 * columns), False

    path = save(tmp_path, {field: value})
    receipt = check_adapter(str(path), BaseShape(*SHAPE), "float32", 64, base_weights=stored)
    assert receipt.changes_tables == receipt.is_compared == (value is not None)
    e2e = Path(__file__).parents[1] / "e2e/test_embeddings_and_heads.py"
    assert field in e2e.read_text(), "its answers are compared with PEFT's"


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_a_field_that_is_not_served_is_refused_by_name(tmp_path: Path, field: str) -> None:
    value, words = REFUSED[field]
    file = save(tmp_path, {}) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(AdapterFormatError, match=f"'{field}'") as error:
        check_adapter(str(tmp_path), BaseShape(*SHAPE), "float32", 64)
    assert words in str(error.value)


@pytest.mark.parametrize("kind", sorted(set(PeftType) - {PeftType.LORA}))
def test_every_other_type_is_refused_by_name(tmp_path: Path, kind: PeftType) -> None:
    file = save(tmp_path, {}) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": kind.value}))
    with pytest.raises(AdapterFormatError, match=f"'peft_type' is \"{kind.value}\""):
        check_adapter(str(tmp_path), BaseShape(*SHAPE), "float32", 64)


# What the initialisation leaves to the adapter: PEFT's answer is that of the plain base with the weights.
PLAIN_KINDS = ["eva", "gaussian", "lora_ga", "mica", "orthogonal"]
ALTERING_KINDS = ["corda", "loftq", "olora", "pissa", "pissa_niter_4"]


def test_every_initialisation_of_peft_is_looked_at() -> None:
    """The names in the type of `init_lora_weights`, and lora_ga, which the type lacks."""
    annotation = str(LoraConfig.__dataclass_fields__["init_lora_weights"].type)
    known = {f"'{kind}'" for kind in [*PLAIN_KINDS, *ALTERING_KINDS]} | {"'pissa_niter_[number of iters]'"}
    named = {part.strip() for part in annotation.partition("Literal[")[2].rstrip("]").split(", ")}
    assert named <= known, annotation
    assert "'pissa'" in named


@pytest.mark.parametrize("kind", ALTERING_KINDS)
def test_an_initialisation_that_alters_the_base_is_refused_with_the_call_that_helps(
    tmp_path: Path, kind: str
) -> None:
    file = save(tmp_path, {}) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": kind}))
    with pytest.raises(AdapterFormatError, match=f"'init_lora_weights' is \"{kind}\"") as error:
        check_adapter(str(tmp_path), BaseShape(*SHAPE), "float32", 64)
    call = "merge_and_unload()" if kind == "loftq" else "save_pretrained(DIRECTORY, path_initial_model_for"
    assert call in str(error.value)


def test_an_initialisation_nobody_knows_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path, {}) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "telepathy"}))
    with pytest.raises(AdapterFormatError, match="is telepathy, which is no initialisation known here"):
        check_adapter(str(tmp_path), BaseShape(*SHAPE), "float32", 64)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["olora", "pissa"])
def test_the_call_that_the_refusal_names_gives_an_adapter_that_computes_the_same(
    tmp_path: Path, kind: str
) -> None:
    """A trained PiSSA or OLoRA adapter, saved as the refusal says, onto the unaltered base."""
    base = tiny_llama()
    plain = tiny_llama()
    plain.load_state_dict(base.state_dict())
    model = get_peft_model(base, LoraConfig(r=4, target_modules=ALL, init_lora_weights=kind))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "initial"))
    model.peft_config["default"].init_lora_weights = kind
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(tmp_path / "raw"))
    with pytest.raises(AdapterFormatError, match="path_initial_model_for_weight_conversion=INITIAL"):
        load_packed(tmp_path / "raw")
    tokens = torch.tensor([[1, 5, 9, 20, 7]])
    with torch.inference_mode():
        expected = model(tokens).logits
    model.save_pretrained(
        str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    assert our_modules(load_packed(tmp_path / "plain")) == peft_modules(tmp_path / "plain")
    converted = PeftModel.from_pretrained(plain, str(tmp_path / "plain"))
    with torch.inference_mode():
        torch.testing.assert_close(converted(tokens).logits, expected, rtol=1e-3, atol=1e-3)
