"""Adapters in other containers, and given as tensors: PEFT's tokens, in one batch with PEFT's directories."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loraserve import LLM, SamplingParams
from loraserve.adapters.stored import AdapterStore
from loraserve.cli.main import main
from loraserve.errors import AdapterFormatError, CapacityError, InvalidRequestError
from safetensors.torch import load_file, save_file

from tests.adapters.container_writer import write_gguf, write_trtllm
from tests.e2e.oracle import ALL, AdapterSpec, make_adapter
from tests.e2e.tiny import NUM_TOKENS, PROMPT, peft_answers
from tests.models.tiny import make_model, save_model

HEADS = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}
OUT_FEATURES = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
PARAMS = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "memory": "8MiB", "num_threads": 1}


@pytest.fixture(scope="module")
def peft(
    tiny_model: tuple[Path, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Name → directory: all modules, several ranks; some modules of one layer."""
    path = tmp_path_factory.mktemp("peft")
    specs = [
        AdapterSpec("all", 6, ALL, std=0.5),
        AdapterSpec(
            "ranks", 4, ALL, std=0.5, extra={"rank_pattern": {"q_proj": 12, "layers.1.mlp.up_proj": 3}}
        ),
        AdapterSpec("some", 8, ["q_proj", "o_proj"], std=0.8, extra={"layers_to_transform": [1]}),
    ]
    return {spec.name: str(make_adapter(tiny_model[1], spec, path, 9)) for spec in specs}


@pytest.fixture(scope="module")
def expected(tiny_model: tuple[Path, torch.nn.Module], peft: dict[str, str]) -> dict[str, list[int]]:
    return peft_answers(tiny_model[1], peft)


@pytest.fixture
def llm(tiny_model: tuple[Path, torch.nn.Module]) -> Iterator[LLM]:
    with LLM(str(tiny_model[0]), **SETTINGS) as llm:
        yield llm


def answers(llm: LLM, names: list[str]) -> list[list[int]]:
    return [output.token_ids for output in llm.generate([PROMPT] * len(names), PARAMS, adapter=names)]


def test_every_container_gives_pefts_tokens_in_one_batch(
    tiny_model: tuple[Path, torch.nn.Module],
    peft: dict[str, str],
    expected: dict[str, list[int]],
    tmp_path: Path,
    llm: LLM,
) -> None:
    served = {}
    for name, directory in peft.items():
        file = write_gguf(Path(directory), tmp_path / f"{name}.gguf", HEADS)
        pair = write_trtllm(Path(directory), tmp_path / f"{name}-npy", out_features=OUT_FEATURES)
        config = json.loads((Path(directory) / "adapter_config.json").read_text())
        tensors = load_file(Path(directory) / "adapter_model.safetensors")
        llm.load_adapter(f"{name}-peft", directory)
        receipts = {
            f"{name}-gguf": llm.load_adapter(f"{name}-gguf", file),
            f"{name}-npy": llm.load_adapter(f"{name}-npy", pair),
            f"{name}-memory": llm.load_adapter(f"{name}-memory", tensors=tensors, config=config),
        }
        assert receipts[f"{name}-gguf"].notes == ["read from a GGUF adapter, alpha 16"]
        assert "TensorRT-LLM" in receipts[f"{name}-npy"].notes[0]
        for served_name in (f"{name}-peft", *receipts):
            served[served_name] = expected[name]
    hashes = {adapter.name: adapter.receipt.hash for adapter in llm.adapters()}
    assert hashes["all-peft"] == hashes["all-gguf"] == hashes["all-memory"]
    assert answers(llm, list(served)) == list(served.values())
    paths = {adapter.name: adapter.path for adapter in llm.adapters()}
    assert paths["all-memory"] == "memory:all-memory"
    assert paths["all-gguf"] == str(tmp_path / "all.gguf")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_gguf_adapter_is_checked_and_found_in_its_directory(
    tiny_model: tuple[Path, torch.nn.Module],
    peft: dict[str, str],
    expected: dict[str, list[int]],
    tmp_path: Path,
    llm: LLM,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_gguf(Path(peft["all"]), tmp_path / "lora.gguf", HEADS, dtype=np.float16)
    llm.load_adapter("x", tmp_path)
    assert len(answers(llm, ["x"])[0]) == NUM_TOKENS
    (tmp_path / "lora.gguf").unlink()
    llm.unload_adapter("x")
    write_gguf(Path(peft["all"]), tmp_path / "lora.gguf", HEADS)
    llm.load_adapter("x", tmp_path / "lora.gguf")
    (tmp_path / "lora.gguf").unlink()  # what is served was converted when it was registered
    assert answers(llm, ["x"]) == [expected["all"]]
    file = write_gguf(Path(peft["all"]), tmp_path / "again.gguf", HEADS)
    assert main(["adapters", "check", str(file), "--model", str(tiny_model[0])]) == 0
    assert "28, all applied" in capsys.readouterr().out


def test_alpha_zero_in_a_gguf_adapter_means_no_scale(
    tiny_model: tuple[Path, torch.nn.Module], tmp_path: Path, llm: LLM
) -> None:
    spec = AdapterSpec("plain", 4, ALL, alpha=4, std=0.5)
    directory = str(make_adapter(tiny_model[1], spec, tmp_path, 3))
    expected = peft_answers(tiny_model[1], {"plain": directory})["plain"]
    llm.load_adapter("x", write_gguf(Path(directory), tmp_path / "x.gguf", HEADS, alpha=0.0))
    assert answers(llm, ["x"]) == [expected]


def test_other_architectures_keep_their_rows_and_are_refused_beside_another_model(
    tmp_path: Path, llm: LLM
) -> None:
    model = make_model("qwen2 tied")
    base = save_model(model, tmp_path / "base")
    plain = make_adapter(model, AdapterSpec("plain", 4, ["q_proj", "k_proj"]), tmp_path, 3)
    file = write_gguf(plain, tmp_path / "x.gguf", HEADS, architecture="qwen2")
    with LLM(str(base), dtype="float32", memory="16MiB", num_threads=1) as other:
        assert other.load_adapter("x", file).hash == other.load_adapter("peft", plain).hash
    with pytest.raises(AdapterFormatError, match="general.architecture 'qwen2', the model's is 'llama'"):
        llm.load_adapter("x", file)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pair_in_two_bytes_a_number_is_read(
    peft: dict[str, str], tmp_path: Path, llm: LLM, dtype: torch.dtype
) -> None:
    pair = write_trtllm(
        Path(peft["some"]), tmp_path / "npy", dtype=dtype, columns=4, out_features=OUT_FEATURES
    )
    receipt = llm.load_adapter("x", pair)
    assert receipt.modules == ["q_proj", "o_proj"]
    assert receipt.notes[1] == "2 modules whose B is zero left out"
    assert len(answers(llm, ["x"])[0]) == NUM_TOKENS


def test_a_fused_row_of_qkv_is_three_modules(
    tiny_model: tuple[Path, torch.nn.Module], tmp_path: Path, llm: LLM
) -> None:
    """One A for q, k and v, as TensorRT-LLM's attn_qkv has it; PEFT's tokens of three modules with that A."""
    spec = AdapterSpec("qkv", 4, ["q_proj", "k_proj", "v_proj"], alpha=4, std=0.5)
    directory = make_adapter(tiny_model[1], spec, tmp_path, 3)
    tensors = load_file(directory / "adapter_model.safetensors")
    rows = []
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.self_attn"
        a = tensors[f"{prefix}.q_proj.lora_A.weight"]
        for module in ("k_proj", "v_proj"):
            tensors[f"{prefix}.{module}.lora_A.weight"] = a.clone()
        b = [tensors[f"{prefix}.{module}.lora_B.weight"] for module in ("q_proj", "k_proj", "v_proj")]
        rows.append(torch.cat([a.flatten(), torch.cat(b).flatten()]))
    save_file(tensors, directory / "adapter_model.safetensors")
    expected = peft_answers(tiny_model[1], {"qkv": str(directory)})["qkv"]
    pair = tmp_path / "npy"
    pair.mkdir()
    np.save(pair / "model.lora_weights.npy", torch.stack(rows)[None].numpy())
    np.save(pair / "model.lora_config.npy", np.array([[[0, 0, 4], [0, 1, 4]]], np.int32))
    llm.load_adapter("x", pair)
    assert answers(llm, ["x"]) == [expected]


def edit_arrays(change: Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]) -> Callable[[Path], Any]:
    def apply(path: Path) -> None:
        weights, config = (np.load(path / f"model.lora_{name}.npy") for name in ("weights", "config"))
        for name, array in zip(("weights", "config"), change(weights, config), strict=True):
            np.save(path / f"model.lora_{name}.npy", array)

    return apply


def put_archive(path: Path) -> None:
    with (path / "model.lora_config.npy").open("wb") as file:
        np.savez(file, a=1)


def with_row(column: int, value: int) -> Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]:
    def change(weights: np.ndarray, config: np.ndarray) -> tuple[Any, Any]:
        config[0, 0, column] = value
        return weights, config

    return change


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (edit_arrays(with_row(0, 18)), "module id 18, supported are 0 to 7"),
        (edit_arrays(with_row(0, 7)), "is there twice|numbers a row"),
        (edit_arrays(with_row(1, 2)), "base has 2 layers"),
        (edit_arrays(with_row(1, -1)), "base has 2 layers"),
        (edit_arrays(with_row(2, 0)), "rank 0"),
        (edit_arrays(with_row(2, 10**6)), "numbers a row of the weights has"),
        (edit_arrays(lambda w, c: (w[:, 1:], c)), "rows"),
        (edit_arrays(lambda w, c: (w[0], c)), "expected 3 dimensions"),
        (edit_arrays(lambda w, c: (w.astype(np.float64), c)), "has float64"),
        (edit_arrays(lambda w, c: (w, c.astype(np.int64))), "expected int32"),
        (edit_arrays(lambda w, c: (w, np.concatenate([c, c[..., :1] * 0 + 1], 2))), "says is_dora"),
        (lambda path: (path / "model.lora_config.npy").write_bytes(b"\x93NUMPY\1\0"), "no valid|not a valid"),
        (put_archive, "an archive of arrays"),
    ],
)
def test_broken_pairs_are_refused(
    peft: dict[str, str], tmp_path: Path, llm: LLM, break_it: Callable[[Path], Any], words: str
) -> None:
    pair = write_trtllm(Path(peft["all"]), tmp_path / "npy", out_features=OUT_FEATURES)
    break_it(pair)
    with pytest.raises(AdapterFormatError, match=words):
        llm.load_adapter("x", pair)
    assert llm.adapters() == []


def test_a_model_as_gguf_is_no_adapter(peft: dict[str, str], tmp_path: Path, llm: LLM) -> None:
    import gguf  # noqa: PLC0415

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_type("model")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(AdapterFormatError, match="that of a LoRA adapter is 'adapter'"):
        llm.load_adapter("x", tmp_path / "model.gguf")


def memory(directory: str) -> dict[str, Any]:
    path = Path(directory)
    config = json.loads((path / "adapter_config.json").read_text())
    return {"tensors": load_file(path / "adapter_model.safetensors"), "config": config}


def test_tensors_are_kept_for_later_loads_and_gone_with_the_adapter(
    peft: dict[str, str], tiny_adapters: dict[str, str], tiny_model: tuple[Path, torch.nn.Module]
) -> None:
    with LLM(str(tiny_model[0]), **SETTINGS | {"memory": "1MiB"}) as llm:
        store = llm._engine.adapters.tensor_store
        names = [f"a{index}" for index in range(40)]
        for name in names:
            llm.load_adapter(name, **memory(tiny_adapters[name]))
        first = answers(llm, names)
        assert answers(llm, names[::-1]) == first[::-1]
        assert sum(adapter.num_loads for adapter in llm.adapters()) > len(names), "none was evicted"
        assert store.nbytes > 0
        receipt = llm.load_adapter("a0", **memory(tiny_adapters["a9"]), replace=True)
        assert receipt.hash != llm.load_adapter("other", tiny_adapters["a0"]).hash
        with pytest.raises(InvalidRequestError, match="registered"):
            llm.load_adapter("a0", **memory(tiny_adapters["a1"]))
        for name in [*names, "other"]:
            llm.unload_adapter(name)
        answers(llm, [None])  # type: ignore[list-item]  a step, which forgets
        assert store.nbytes == 0


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"tensors": {}}, InvalidRequestError, "give at least one"),
        ({"tensors": {"a": 1}}, InvalidRequestError, "expected a name and a torch tensor"),
        ({"tensors": {"a": torch.ones(2)}}, AdapterFormatError, "tensor a"),
        ({"tensors": {"a": torch.ones(2).to_sparse()}}, InvalidRequestError, "give a dense one"),
        ({"tensors": {"a": torch.ones(2, device="meta")}}, InvalidRequestError, "give a dense one"),
        ({"config": None}, InvalidRequestError, "give a path, or tensors"),
        ({"tensors": None}, InvalidRequestError, "give a path, or tensors"),
        ({"config": {"peft_type": object()}}, InvalidRequestError, "no place in JSON"),
        ({"config": {"peft_type": "LORA", "x": "y" * 2**20}}, InvalidRequestError, "limit is 1048576"),
        ({"config": {"peft_type": "IA3"}}, AdapterFormatError, "field 'peft_type'"),
        ({"config": [1]}, InvalidRequestError, "config is no JSON object"),
        ({"path": "x"}, InvalidRequestError, "give a path, or tensors"),
    ],
)
def test_what_is_given_wrongly_is_refused(
    peft: dict[str, str], llm: LLM, given: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        llm.load_adapter("x", **memory(peft["some"]) | given)
    assert llm.adapters() == []
    assert llm._engine.adapters.tensor_store.nbytes == 0


def test_a_lora_config_of_peft_is_a_config(
    peft: dict[str, str], expected: dict[str, list[int]], llm: LLM
) -> None:
    from peft import LoraConfig  # noqa: PLC0415

    tensors = memory(peft["all"])["tensors"]
    config = LoraConfig.from_pretrained(peft["all"]).to_dict()
    tensors = {name: tensor.t().contiguous().t() for name, tensor in tensors.items()}  # not contiguous
    llm.load_adapter("x", tensors=tensors, config=config)
    assert answers(llm, ["x"]) == [expected["all"]]


def test_the_store_has_a_bound_and_gives_back_what_is_dropped() -> None:
    store = AdapterStore(max_nbytes=100, max_adapter_nbytes=60)
    first = store.begin("a")
    first.write(b"x" * 60)
    with pytest.raises(CapacityError, match="a has more than 60 bytes"):
        first.write(b"x")
    second = store.begin("b")
    with pytest.raises(CapacityError, match="take 60 of 100 bytes, and b does not fit"):
        second.write(b"x" * 50)
    kept = first.finish("{}")
    assert Path(kept.files[1]).read_bytes() == b"x" * 60
    del first
    assert store.nbytes == 60
    del kept
    assert store.nbytes == 0
    second.write(b"x" * 50)
    del second
    assert store.nbytes == 0
