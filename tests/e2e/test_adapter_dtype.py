"""Adapters kept in int8: as PEFT computes with the same values, near the file's values, more at once."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM, SamplingParams
from loraserve.backends.cpu.backend import CpuBackend
from loraserve.config import EngineConfig
from loraserve.engine.model_runner import ModelRunner
from loraserve.errors import InvalidRequestError
from safetensors.torch import load_file, save_file

from tests.e2e.case import Case
from tests.e2e.oracle import ALL, HETEROGENEOUS, AdapterSpec, PeftOracle
from tests.e2e.prompts import PROMPTS
from tests.e2e.test_dora_and_biases import GREEDY, PROMPT, SPECS, make
from tests.e2e.test_embeddings_and_heads import LORA
from tests.e2e.test_embeddings_and_heads import make as make_of_tables
from tests.e2e.test_host_tier import ask, push_out
from tests.e2e.tiny import NUM_DISTINCT
from tests.models.tiny import make_model, save_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter .* invalid shape"),
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed"),
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]


def as_int8(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The values that int8 stands for, with a scale for each rank: the largest along `dim` is 127."""
    scale = values.abs().amax(dim, keepdim=True) / 127
    return (values / torch.where(scale > 0, scale, 1)).round().clamp(-127, 127) * scale


def with_int8_values(adapter: str, directory: Path) -> str:
    """A copy of the PEFT directory whose A and B of linears and head have the values that int8 stands for."""
    path = directory / Path(adapter).name
    shutil.copytree(adapter, path)
    tensors = load_file(path / "adapter_model.safetensors")
    for name, values in tensors.items():
        if name.endswith(("lora_A.weight", "lora_B.weight")):
            tensors[name] = as_int8(values.float(), 1 if "lora_A" in name else 0)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(path)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Served as they are and kept in int8; PEFT has the values of int8."""
    base = make_model("llama with biases")
    path = save_model(base, tmp_path_factory.mktemp("model"))
    directory, dequantised = (tmp_path_factory.mktemp(name) for name in ("adapters", "dequantised"))
    made = [make(base, spec, directory, seed) for seed, spec in enumerate(SPECS)]
    made += [
        make_of_tables(base, spec, directory / name, seed)
        for seed, (name, spec) in enumerate(LORA.items())
        if name in ("lora_head", "lora_both", "lora_over_tokens")
    ]
    served = {one.name.replace(" ", "_").replace(",", ""): str(one) for one in made}
    adapters = {name: with_int8_values(one, dequantised) for name, one in served.items()}
    with LLM(str(path), served, dtype="float32", adapter_dtype="int8", memory="16MiB", device="cpu") as llm:
        yield Case(base, path, adapters, llm)


def test_a_mixed_batch_is_token_exact_with_peft_on_the_values_of_int8(case: Case) -> None:
    case.check_mixed_batch(PROMPT, GREEDY)


@pytest.fixture(scope="module")
def dequantised_oracle(
    hf_smollm2: Any, adapter_paths: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> PeftOracle:
    """On a copy of its own, as PEFT puts its layers into the model it is given."""
    directory = tmp_path_factory.mktemp("dequantised")
    dequantised = {name: with_int8_values(path, directory) for name, path in adapter_paths.items()}
    return PeftOracle(copy.deepcopy(hf_smollm2[0]), dequantised)


def test_smollm2_is_token_exact_with_peft_on_the_values_of_int8(
    smollm2_path: str,
    adapter_paths: dict[str, str],
    dequantised_oracle: PeftOracle,
    hf_smollm2: Any,
) -> None:
    names = [None, *(spec.name for spec in HETEROGENEOUS)]
    prompts = [hf_smollm2[1](text)["input_ids"] for text in PROMPTS[: len(names)]]
    names = names[: len(prompts)]
    settings: dict[str, Any] = {"dtype": "float32", "quantization": "none", "memory": "2GiB"}
    params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    with LLM(smollm2_path, adapter_paths, adapter_dtype="int8", device="cpu", **settings) as llm:
        outputs = llm.generate(prompts, params, names)
    answers = [output.token_ids for output in outputs]
    assert answers == [
        dequantised_oracle.greedy(prompt, answer, name)
        for prompt, answer, name in zip(prompts, answers, names, strict=True)
    ]


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_request_gives_the_same_bits_alone_and_in_a_batch(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str], dtype: str, quantization: str
) -> None:
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=3)
    names = [None, *list(tiny_adapters)[:11]]
    prompts = [PROMPT + [13 + index] * (3 * index) for index in range(len(names))]
    settings: dict[str, Any] = {"dtype": dtype, "quantization": quantization, "memory": "16MiB"}
    with LLM(
        str(tiny_model[0]),
        tiny_adapters,
        adapter_dtype="int8",
        device="cpu",
        prefix_caching=False,
        **settings,
    ) as llm:
        mixed = llm.generate(prompts, params, names)
        for prompt, name, together in zip(prompts, names, mixed, strict=True):
            (alone,) = llm.generate([prompt], params, name)
            assert (alone.token_ids, alone.logprobs) == (together.token_ids, together.logprobs), name


@pytest.mark.parametrize("rank", [8, 16, 64])
def test_answers_stay_near_those_of_the_files_values(rank: int, tmp_path: Path) -> None:
    """Log-probabilities of the likeliest tokens move by less than 0.1 where the adapter moves them by 2."""
    base = make_model("llama with biases")
    path = save_model(base, tmp_path / "model")
    adapter = make(base, AdapterSpec("a", rank, ALL, alpha=2 * rank, std=0.1), tmp_path, seed=rank)
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
    prompts = [[5 + place, *PROMPT[: 1 + place]] for place in range(len(PROMPT))]

    def tops(adapter_dtype: str, name: str | None) -> list[dict[int, float]]:
        settings: dict[str, Any] = {"adapter_dtype": adapter_dtype, "memory": "16MiB", "device": "cpu"}
        with LLM(str(path), {"a": str(adapter)}, dtype="float32", **settings) as llm:
            outputs = llm.generate(prompts, params, name)
        return [dict(output.completions[0].logprobs[0].top) for output in outputs]

    def distance(one: list[dict[int, float]], other: list[dict[int, float]]) -> float:
        pairs = [
            (a[token], b[token]) for a, b in zip(one, other, strict=True) for token in a.keys() & b.keys()
        ]
        return max(abs(a - b) for a, b in pairs)

    exact = tops("auto", "a")
    error = distance(tops("int8", "a"), exact)
    assert 0 < error < 0.1
    assert distance(tops("auto", None), exact) > 20 * error


def test_several_times_as_many_fit_as_in_float32_and_answer_almost_alike(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]
) -> None:
    found = {}
    for adapter_dtype, kept in (("auto", "float32"), ("int8", "int8")):
        settings: dict[str, Any] = {"adapter_dtype": adapter_dtype, "memory": "640KiB", "max_num_seqs": 16}
        with LLM(str(tiny_model[0]), tiny_adapters, dtype="float32", **settings) as llm:
            answers = ask(llm, list(tiny_adapters))
            assert llm.info().adapter_dtype == kept
            nbytes = sum(one.receipt.nbytes for one in llm.adapters())
            found[adapter_dtype] = (answers, llm.info().num_resident_adapters, nbytes)
    (exact, few, nbytes), (int8, many, int8_nbytes) = found["auto"], found["int8"]
    assert int8_nbytes < 0.35 * nbytes
    assert few < NUM_DISTINCT / 2
    assert many == NUM_DISTINCT
    agreeing = [
        a == b for one, other in zip(exact, int8, strict=True) for a, b in zip(one, other, strict=True)
    ]
    assert sum(agreeing) > 0.95 * len(agreeing)


def test_an_evicted_adapter_returns_from_main_memory_as_it_was(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]
) -> None:
    settings: dict[str, Any] = {"memory": "256KiB", "max_num_seqs": 4, "adapter_host_memory": "64MiB"}
    with LLM(str(tiny_model[0]), tiny_adapters, dtype="float32", adapter_dtype="int8", **settings) as llm:
        first, *others = tiny_adapters
        before = ask(llm, [first])
        push_out(llm, first, others)
        assert ask(llm, [first]) == before
        assert llm.stats().host_tier.num_hits > 0


def test_a_merged_adapter_is_not_kept_in_int8() -> None:
    with pytest.raises(
        InvalidRequestError, match=r"adapter_dtype is 'int8', and merge folds 'a' into the weights"
    ):
        EngineConfig(model="m", adapters={"a": "/x"}, merge="a", adapter_dtype="int8")


def test_a_device_that_can_not_compute_with_int8_refuses_it_by_name() -> None:
    class Device(CpuBackend):
        name = "cuda"
        keeps_int8_adapters = False

    config = EngineConfig(model="no/model", adapter_dtype="int8")
    backend = Device(config, torch.float32)
    with pytest.raises(
        InvalidRequestError, match=r"adapter_dtype is 'int8', which only a CPU .* device is cuda"
    ):
        ModelRunner(config, backend)
