"""`loraserve adapters merge` writes a sum of adapters as one, as PEFT's add_weighted_adapter does."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM, SamplingParams
from loraserve.cli.main import main
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.e2e.tiny import NUM_TOKENS, PROMPT
from tests.peft_writer import llama_shape, write_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter .* invalid shape"),
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed"),
]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"r": 5, "lora_alpha": 4, "use_rslora": True, "target_modules": ["v_proj", "o_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"q_proj": 11},
        "alpha_pattern": {"down_proj": 20},
        "layers_to_transform": [1],
    },
    "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj"]},
    "lora_bias": {"r": 4, "lora_bias": True, "target_modules": ["q_proj"]},
    "invoked": {"r": 4, "alora_invocation_tokens": [5], "target_modules": ["q_proj"]},
}
WEIGHTS = {"plain": 1.0, "rslora": 0.5, "patterns": 0.25}


@pytest.fixture(scope="module")
def adapters(tiny_model: tuple[Path, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of adapters that PEFT saved, B too random."""
    path = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        peft = get_peft_model(load(tiny_model[0]), LoraConfig(task_type="CAUSAL_LM", **settings))
        for key, parameter in peft.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        peft.save_pretrained(path / name, save_embedding_layers=False)
    return path


def load(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def deltas(peft: Any, adapter: str) -> dict[str, torch.Tensor]:
    """Path → what the adapter adds to the weight, as PEFT has it."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(adapter)
        for name, module in peft.named_modules()
        if hasattr(module, "lora_A") and adapter in module.lora_A
    }


def merge(adapters: Path, output: Path, *more: str, names: tuple[str, ...] = tuple(WEIGHTS)) -> int:
    return main(
        ["adapters", "merge", *(str(adapters / name) for name in names), "--output", str(output), *more]
    )


def weighted(model: Path, adapters: Path, **options: Any) -> dict[str, torch.Tensor]:
    """PEFT's own."""
    peft = PeftModel.from_pretrained(load(model), str(adapters / "plain"), adapter_name="plain")
    for name in WEIGHTS:
        if name != "plain":
            peft.load_adapter(str(adapters / name), adapter_name=name)
    peft.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", **options)
    return deltas(peft, "sum")


@pytest.mark.parametrize("with_model", [False, True])
def test_the_sum_is_pefts_concatenation_and_a_request_gets_the_same_as_from_the_mapping(
    tiny_model: tuple[Path, torch.nn.Module],
    adapters: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    with_model: bool,
) -> None:
    model = tiny_model[0]
    more = ["--model", str(model)] if with_model else []
    assert merge(adapters, tmp_path / "sum", "--weights", "1,0.5,0.25", *more) == 0
    assert "sum: 3 adapters on 8 modules, ranks 5 to 19, " in capsys.readouterr().out
    peft = PeftModel.from_pretrained(load(model), str(tmp_path / "sum"))
    ours, expected = deltas(peft, "default"), weighted(model, adapters, combination_type="cat")
    assert ours.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(ours[name], delta, rtol=1e-5, atol=1e-5, msg=name)
    served = {name: str(adapters / name) for name in WEIGHTS} | {"sum": str(tmp_path / "sum")}
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    with LLM(str(model), served, dtype="float32", memory="8MiB", max_num_seqs=2) as llm:
        outputs = llm.generate([PROMPT] * 3, params, ["sum", WEIGHTS, None])
    assert outputs[0].token_ids == outputs[1].token_ids != outputs[2].token_ids


def test_a_sum_cut_to_a_rank_is_pefts_svd_and_its_error_is_told(
    tiny_model: tuple[Path, torch.nn.Module],
    adapters: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model[0]
    assert merge(adapters, tmp_path / "cut", "--weights", "1,0.5,0.25", "--rank", "6") == 0
    told = capsys.readouterr().out
    ours = deltas(PeftModel.from_pretrained(load(model), str(tmp_path / "cut")), "default")
    whole = weighted(model, adapters, combination_type="cat")
    expected = weighted(model, adapters, combination_type="svd", svd_rank=6)
    cut = size = 0.0
    for name, delta in whole.items():
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-3, atol=1e-3, msg=name)
        error = float(torch.linalg.norm(ours[name] - delta) / torch.linalg.norm(delta))
        row = re.search(rf"{re.escape(name)}  rank (\d+) to (\d+), error ([\d.]+)%", told)
        assert row is not None
        assert float(row[3]) == pytest.approx(100 * error, abs=0.02)
        assert int(row[2]) == min(6, int(row[1]))
        cut += float(torch.linalg.norm(ours[name] - delta)) ** 2
        size += float(torch.linalg.norm(delta)) ** 2
    total = re.search(r"total error ([\d.]+)%", told)
    assert total is not None
    assert float(total[1]) == pytest.approx(100 * (cut / size) ** 0.5, abs=0.02)
    assert cut > 0.0


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ("dora", r"dora can't be merged with others: it has DoRA \(use_dora\)"),
        ("lora_bias", r"lora_bias can't be merged with others: it has biases of B \(lora_bias\)"),
        ("invoked", r"invoked can't be merged with others: .*alora_invocation_tokens"),
        ("narrow", "q_proj has 64 inputs in .*plain and 32 in .*narrow: adapters of different bases"),
        ("none", "none: no lora_A and lora_B|none"),
    ],
)
def test_what_is_no_delta_of_the_same_base_is_refused_by_name(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str, text: str
) -> None:
    write_adapter(adapters / "narrow", llama_shape(2, 32, 2, 1, 16, 48))
    assert merge(adapters, tmp_path / "sum", names=("plain", other)) == 1
    assert re.search(text, capsys.readouterr().err)
    assert not (tmp_path / "sum").exists()


def test_copies_of_the_base_s_embeddings_need_the_model_to_compare_with(
    tiny_model: tuple[Path, torch.nn.Module],
    adapters: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    peft = PeftModel.from_pretrained(load(tiny_model[0]), str(adapters / "plain"))
    peft.save_pretrained(tmp_path / "copied", save_embedding_layers=True)
    shutil.copytree(adapters / "rslora", tmp_path / "rslora")
    names = ("copied", "rslora")
    assert merge(tmp_path, tmp_path / "sum", names=names) == 1
    assert "give --model" in capsys.readouterr().err
    assert merge(tmp_path, tmp_path / "sum", "--model", str(tiny_model[0]), names=names) == 0
    assert merge(adapters, tmp_path / "plain", names=("plain", "rslora")) == 0
    sums = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("sum", "plain")]
    assert sums[0].keys() == sums[1].keys()
    assert all(torch.equal(sums[0][name], sums[1][name]) for name in sums[0])


def test_another_base_by_name_or_stamp_is_refused_and_a_common_stamp_is_kept(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("plain", "rslora"):
        shutil.copytree(adapters / name, tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": f"org/{name}"}))
    names = ("plain", "rslora")
    assert merge(tmp_path, tmp_path / "sum", names=names) == 1
    assert "is of base 'org/plain', " in capsys.readouterr().err
    stamps = ["base1:" + "ab" * 32, "base1:" + "cd" * 32]
    for name, stamp in zip(names, stamps, strict=True):
        (tmp_path / name / "loraserve.json").write_text(json.dumps({"base_fingerprint": stamp}))
    assert merge(tmp_path, tmp_path / "sum", names=names) == 1
    assert f"stamped for base {stamps[0]}" in capsys.readouterr().err
    shutil.copy(tmp_path / "plain/loraserve.json", tmp_path / "rslora/loraserve.json")
    assert merge(tmp_path, tmp_path / "sum", names=names) == 0
    assert json.loads((tmp_path / "sum/loraserve.json").read_text()) == {"base_fingerprint": stamps[0]}


def test_what_is_there_is_overwritten_only_when_that_is_said(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, names = tmp_path / "sum", ("plain", "rslora")
    assert merge(adapters, output, names=names) == 0
    before = (output / "adapter_model.safetensors").read_bytes()
    assert merge(adapters, output, "--weights", "1,2", names=names) == 1
    assert "--overwrite writes over it" in capsys.readouterr().err
    assert (output / "adapter_model.safetensors").read_bytes() == before
    assert merge(adapters, output, "--weights", "1,2", "--overwrite", names=names) == 0
    assert (output / "adapter_model.safetensors").read_bytes() != before
    assert sorted(os.listdir(output)) == ["adapter_config.json", "adapter_model.safetensors"]
    (output / "loraserve.json").write_text('{"stop": [";"]}')
    assert merge(adapters, output, "--overwrite", names=names) == 1
    (output / "loraserve.json").unlink()
    (output / "notes.txt").write_text("mine")
    assert merge(adapters, output, "--overwrite", names=names) == 1
    assert "holds 'notes.txt'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--weights", "1"], "weights has 1 numbers, and there are 2 adapters"),
        (["--weights", "1,x"], "weights is '1,x'"),
        (["--weights", "1,0"], "weights has 0, give finite numbers other than 0"),
        (["--weights", "1,nan"], "weights has nan"),
        (["--rank", "0"], "rank is 0, it must be at least 1"),
    ],
)
def test_weights_and_ranks_are_checked(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], text: str
) -> None:
    assert merge(adapters, tmp_path / "sum", *more, names=("plain", "rslora")) == 1
    assert text in capsys.readouterr().err
