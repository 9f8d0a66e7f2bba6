"""Bad input: a typed error that says what was wrong, and nothing else disturbed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loraserve import LLM, EngineConfig, SamplingParams
from loraserve.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    CapacityError,
    InvalidRequestError,
    LoraserveError,
    ModelError,
)
from safetensors.torch import load_file, save_file

PARAMS = SamplingParams(max_tokens=8, temperature=0.0)

REQUESTS: list[tuple[str, dict[str, Any], type[LoraserveError], str]] = [
    ("unknown adapter", {"adapter": "nope"}, AdapterNotFoundError, "no adapter named 'nope'"),
    ("unknown adapter in a mix", {"adapter": {"r4-all": 1.0, "nope": 1.0}}, AdapterNotFoundError, "'nope'"),
    ("empty mix", {"adapter": {}}, InvalidRequestError, "0 adapters"),
    ("weight not a number", {"adapter": {"r4-all": float("nan")}}, InvalidRequestError, "weight of adapter"),
    ("empty prompt", {"prompts": ""}, InvalidRequestError, "prompt is empty"),
    ("empty token list", {"prompts": [[]]}, InvalidRequestError, "prompt is empty"),
    ("prompt too long", {"prompts": [[1] * 9000]}, InvalidRequestError, "prompt has 9000 tokens, limit is"),
    ("token id too large", {"prompts": [[1, 49152]]}, InvalidRequestError, "token id 49152 is out of range"),
    ("token id negative", {"prompts": [[-1]]}, InvalidRequestError, "token id -1 is out of range"),
    ("token id not an integer", {"prompts": [[1.5]]}, InvalidRequestError, "integers"),
    ("no prompt", {"prompts": None}, InvalidRequestError, "prompts is None"),
    ("a number as prompts", {"prompts": 5}, InvalidRequestError, "prompts is 5"),
    ("a lone surrogate", {"prompts": "\ud800"}, InvalidRequestError, "not valid Unicode"),
    ("text far too long", {"prompts": "hi " * 10**6}, InvalidRequestError, "prompt has at least"),
    ("weight too large", {"adapter": {"r4-all": 1e38}}, InvalidRequestError, "weight of adapter"),
    ("adapter name not a string", {"adapter": {1: 0.5}}, InvalidRequestError, "adapter name is 1"),
    ("adapter a number", {"adapter": 3}, InvalidRequestError, "adapter is 3"),
    ("params not params", {"params": [{"max_tokens": 3}]}, InvalidRequestError, "give SamplingParams"),
    (
        "stop token out of range",
        {"params": SamplingParams(min_tokens=1, stop_token_ids=(999999,))},
        InvalidRequestError,
        "token id 999999 is out of range",
    ),
    (
        "biased token out of range",
        {"params": SamplingParams(logit_bias={999999: 1.0})},
        InvalidRequestError,
        "token id 999999 is out of range",
    ),
    ("two adapters for one prompt", {"adapter": ["r4-all", None]}, InvalidRequestError, "2 entries for 1"),
]


@pytest.mark.parametrize(("case", "call", "error", "message"), REQUESTS, ids=[case[0] for case in REQUESTS])
def test_a_bad_request_is_refused_and_good_ones_go_on(
    llm_float32: LLM, case: str, call: dict[str, Any], error: type[LoraserveError], message: str
) -> None:
    with pytest.raises(error, match=message):
        llm_float32.generate(**{"prompts": "Hello", "params": PARAMS, **call})
    assert llm_float32.info().num_running == 0
    assert len(llm_float32.generate("Hello", PARAMS)[0].token_ids) > 0


SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": 1.5}, "max_tokens is 1.5, it must be an integer"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"top_p": 0.0}, "top_p is 0.0"),
    ({"top_p": float("inf")}, "top_p is inf"),
    ({"top_k": -1}, "top_k is -1"),
    ({"min_p": 1.5}, "min_p is 1.5"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ({"repetition_penalty": 1e-38}, "repetition_penalty is 1e-38"),
    ({"stop": 5}, "stop is 5"),
    ({"stop_token_ids": 2}, "stop_token_ids is 2"),
    ({"presence_penalty": 3.0}, "presence_penalty is 3.0"),
    ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
    ({"min_tokens": 20, "max_tokens": 10}, "min_tokens is 20"),
    ({"logprobs": 1000}, "logprobs is 1000"),
    ({"n": 0}, "n is 0"),
    ({"stop": ("",)}, "non-empty string"),
    ({"stop_token_ids": (-1,)}, "stop_token_ids is -1"),
    ({"seed": 1.0}, "seed is 1.0"),
    ({"seed": 2**63}, "seed is 9223372036854775808"),
    ({"typical_p": 0.0}, "typical_p is 0.0"),
    ({"logit_bias": 7}, "logit_bias is 7"),
    ({"logit_bias": {"a": 1}}, "logit_bias token is 'a'"),
    ({"logit_bias": {1: 101}}, "logit_bias is 101"),
    ({"logit_bias": dict.fromkeys(range(2000), 1)}, "logit_bias has 2000 tokens"),
    ({"grammar": "yes|no"}, "give a Grammar"),
]


@pytest.mark.parametrize(("settings", "message"), SAMPLING, ids=[case[1] for case in SAMPLING])
def test_sampling_params_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**settings)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "int4"}, "dtype is 'int4'"),
    ({"device": "tpu"}, "device is 'tpu'"),
    ({"memory": "lots"}, "memory is 'lots'"),
    ({"memory": 0}, "more than 0"),
    ({"memory": 2.5}, "memory is 2.5"),
    ({"memory": "automatic"}, "memory is 'automatic'"),
    ({"memory": None}, "memory is None"),
    ({"memory": "9" * 400}, "at most"),
    ({"max_lora_rank": 0}, "max_lora_rank is 0"),
    ({"max_waiting": 0}, "max_waiting is 0"),
]


@pytest.mark.parametrize(("settings", "message"), CONFIGS, ids=[case[1] for case in CONFIGS])
def test_engine_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        EngineConfig(model="smollm2", **settings)


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def _edit_tensors(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, path / "adapter_model.safetensors")

    return apply


def _truncate(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _pickle(path: Path) -> None:
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.bin").write_bytes(b"\x80\x02.")


def _widen(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    tensors[name] = torch.zeros(tensors[name].shape[0], 4096)


def _integers(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name].to(torch.int32)


ADAPTERS: list[tuple[str, Callable[[Path], None], type[LoraserveError], str]] = [
    ("truncated file", _truncate, AdapterFormatError, "adapter_model.safetensors"),
    ("wrong dtype", _edit_tensors(_integers), AdapterFormatError, "I32"),
    ("wrong shape", _edit_tensors(_widen), AdapterFormatError, "4096.*576"),
    ("pickle", _pickle, AdapterFormatError, "safetensors"),
    (
        "no config",
        lambda path: (path / "adapter_config.json").unlink(),
        LoraserveError,
        "adapter_config.json",
    ),
    ("rank 0", _edit_config(r=0), AdapterFormatError, "rank"),
    ("no such directory", shutil.rmtree, LoraserveError, "broken"),
    ("dora", _edit_config(use_dora=True), AdapterFormatError, "use_dora"),
    ("lora_bias", _edit_config(lora_bias=True), AdapterFormatError, "lora_bias"),
    ("modules_to_save", _edit_config(modules_to_save=["lm_head"]), AdapterFormatError, "modules_to_save"),
]


@pytest.mark.parametrize(("case", "damage", "error", "message"), ADAPTERS, ids=[case[0] for case in ADAPTERS])
def test_a_bad_adapter_is_refused_and_not_registered(
    llm_float32: LLM,
    adapter_paths: dict[str, str],
    tmp_path: Path,
    case: str,
    damage: Callable[[Path], None],
    error: type[LoraserveError],
    message: str,
) -> None:
    path = tmp_path / "broken"
    shutil.copytree(adapter_paths["r8-qv"], path)
    damage(path)
    before = len(llm_float32.adapters())
    with pytest.raises(error, match=message):
        llm_float32.load_adapter("broken", str(path))
    assert len(llm_float32.adapters()) == before


def test_rank_above_the_limit_is_refused_never_truncated(
    smollm2_path: str, adapter_paths: dict[str, str]
) -> None:
    with (
        LLM(smollm2_path, dtype="float32", memory="64MiB", max_lora_rank=16) as llm,
        pytest.raises(AdapterFormatError, match="64.*16"),
    ):
        llm.load_adapter("big", adapter_paths["r64-attention"])


@pytest.mark.parametrize("name", ["a/b", "", "a b", "ä", "../x"])
def test_an_adapter_name_out_of_the_alphabet_is_refused(
    llm_float32: LLM, adapter_paths: dict[str, str], name: str
) -> None:
    with pytest.raises(InvalidRequestError, match="adapter name"):
        llm_float32.load_adapter(name, adapter_paths["r8-qv"])


def test_an_adapter_path_that_is_no_text_is_refused(llm_float32: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="the path of adapter 'a' "):
        llm_float32.load_adapter("a", "/tmp/\ud800")


def test_a_taken_name_with_other_content_is_refused(llm_float32: LLM, adapter_paths: dict[str, str]) -> None:
    llm_float32.load_adapter("r8-qv", adapter_paths["r8-qv"])
    with pytest.raises(InvalidRequestError, match="r8-qv"):
        llm_float32.load_adapter("r8-qv", adapter_paths["r4-all"])


def test_unloading_an_unknown_adapter_is_refused(llm_float32: LLM) -> None:
    with pytest.raises(AdapterNotFoundError, match="'nope'"):
        llm_float32.unload_adapter("nope")


def test_an_adapter_deleted_from_disk_fails_only_its_own_requests(
    smollm2_path: str, adapter_paths: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(adapter_paths["r8-qv"], tmp_path / "gone")
    with LLM(smollm2_path, {"gone": str(tmp_path / "gone")}, dtype="float32", memory="128MiB") as llm:
        shutil.rmtree(tmp_path / "gone")
        with pytest.raises(AdapterUnavailableError, match="gone"):
            llm.generate("Hello", PARAMS, "gone")
        assert len(llm.generate("Hello", PARAMS)[0].token_ids) > 0
        shutil.copytree(adapter_paths["r8-qv"], tmp_path / "gone")
        assert len(llm.generate("Hello", PARAMS, "gone")[0].token_ids) > 0


def test_a_pool_too_small_says_how_much_is_needed(smollm2_path: str, adapter_paths: dict[str, str]) -> None:
    with pytest.raises(CapacityError, match="this model needs at least"):
        LLM(smollm2_path, dtype="float32", memory="800KiB")
    with pytest.raises(CapacityError, match="can't give that much"):
        LLM(smollm2_path, dtype="float32", memory="999999GiB")
    with LLM(smollm2_path, dtype="float32", memory="8MiB") as llm:
        with pytest.raises(InvalidRequestError, match="prompt has 300 tokens, limit is 175"):
            llm.generate([[1] * 300], SamplingParams(max_tokens=100))
        with pytest.raises(CapacityError, match="needs"):
            llm.load_adapter("big", adapter_paths["r64-attention"])
        assert len(llm.generate("Hello", PARAMS)[0].token_ids) > 0


def test_a_missing_model_path_is_named() -> None:
    with pytest.raises(ModelError, match="no/such/model"):
        LLM("./no/such/model")


def test_numpy_values_and_paths_are_taken(llm_float32: LLM, adapter_paths: dict[str, str]) -> None:
    params = SamplingParams(max_tokens=np.int64(4), temperature=np.float32(0.0), ignore_eos=True)
    prompts = [np.array([1, 2, 3]), np.array([4, 5])]
    mixed = llm_float32.generate(prompts, params, [None, {"r4-all": np.float32(1.0)}])
    assert [len(output.token_ids) for output in mixed] == [4, 4]
    assert llm_float32.generate(prompts[0], params)[0].token_ids == mixed[0].token_ids
    llm_float32.load_adapter("from-a-path", Path(adapter_paths["r8-qv"]))
    llm_float32.unload_adapter("from-a-path")


def test_an_almost_zero_temperature_is_greedy(llm_float32: LLM) -> None:
    greedy, almost = (
        llm_float32.generate("Hello", SamplingParams(max_tokens=8, temperature=temperature))[0].token_ids
        for temperature in (0.0, 1e-38)
    )
    assert greedy == almost


def test_the_longest_prompt_gets_one_token(tiny_model: tuple[Path, torch.nn.Module]) -> None:
    with LLM(str(tiny_model[0]), dtype="float32", memory="64MiB") as llm:
        limit = llm.info().max_model_len
        output = llm.generate([[7] * (limit - 1)], SamplingParams(max_tokens=10, ignore_eos=True))[0]
    assert (output.finish_reason, len(output.token_ids)) == ("length", 1)


def test_an_adapter_registered_by_a_relative_path_survives_chdir(
    llm_float32: LLM, adapter_paths: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(adapter_paths["gate-only"], tmp_path / "relative")
    _edit_config(lora_alpha=7)(tmp_path / "relative")
    monkeypatch.chdir(tmp_path)
    llm_float32.load_adapter("relative", "relative")
    monkeypatch.chdir("/")
    assert len(llm_float32.generate("Hello", PARAMS, "relative")[0].token_ids) > 0
    llm_float32.unload_adapter("relative")


def test_a_progress_bar_is_shown_when_asked_for(llm_float32: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm_float32.generate(["Hello"] * 3, PARAMS, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_a_setting_that_is_none_is_told_with_the_likely_one() -> None:
    with pytest.raises(InvalidRequestError, match="'threads' is no setting, did you mean num_threads?"):
        LLM("smollm2", threads=1)
