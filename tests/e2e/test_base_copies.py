"""The model's own embeddings, which PEFT saves beside an adapter: left out."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM, SamplingParams
from loraserve.cli.main import main
from loraserve.errors import AdapterFormatError, AdapterUnavailableError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.models.tiny import make_model, save_model

HEAD = "base_model.model.lm_head.weight"
PROMPT = [1, 5, 9, 20, 7]
PARAMS = SamplingParams(max_tokens=1, temperature=0.0, logprobs=5)
SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "memory": "16MiB", "num_threads": 1}


@pytest.fixture(scope="module", params=["llama", "llama tied"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, and `plain` and `copies`: one adapter, saved by PEFT without and with the embeddings."""
    path = tmp_path_factory.mktemp("copies")
    save_model(make_model(request.param), path / "model")
    base = AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32)
    torch.manual_seed(3)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft = get_peft_model(base, config)
    peft.save_pretrained(path / "plain", save_embedding_layers=False)
    peft.save_pretrained(path / "copies", save_embedding_layers=True)
    return path


def edit(adapter: Path, name: str, change: Any) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file)


def test_copies_cost_nothing_and_answers_are_pefts(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved / "model", dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, saved / "copies").eval()
    with torch.inference_mode():
        expected = torch.log_softmax(peft(torch.tensor([PROMPT])).logits[0, -1], -1)
    with LLM(str(saved / "model"), {"copies": str(saved / "copies")}, **SETTINGS) as llm:
        plain = llm.load_adapter("plain", saved / "plain")
        copies = llm.adapters()[0].receipt
        assert (copies.base_copies, plain.base_copies) == (["embed_tokens", "lm_head"], [])
        assert (copies.nbytes, copies.hash) == (plain.nbytes, plain.hash)
        logprob = llm.generate([PROMPT], PARAMS, "copies")[0].completions[0].logprobs[0]
    assert logprob.token_id == int(expected.argmax())
    for token_id, value in logprob.top:
        assert value == pytest.approx(float(expected[token_id]), abs=1e-4)
    assert main(["adapters", "check", str(saved / "copies"), "--model", str(saved / "model")]) == 0
    assert "embed_tokens, lm_head, bit-equal to the model's own and left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (HEAD, lambda t: torch.cat([t, t[:2]]), "row of token 199, for which|in the base both are one"),
        (HEAD, lambda t: t.to(torch.int8), "its dtype is I8"),
    ],
)
def test_what_can_not_take_the_bases_place_is_refused(
    saved: Path, tmp_path: Path, name: str, change: Any, words: str
) -> None:
    adapter = shutil.copytree(saved / "copies", tmp_path / "adapter")
    edit(adapter, name, change)
    with (
        LLM(str(saved / "model"), **SETTINGS) as llm,
        pytest.raises(AdapterFormatError, match=words),
    ):
        llm.load_adapter("trained", adapter)


def test_a_copy_that_changes_after_registration_is_noticed_at_the_next_load(
    saved: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(saved / "copies", tmp_path / "adapter")
    with LLM(str(saved / "model"), {"a": str(adapter)}, **SETTINGS) as llm:
        edit(adapter, HEAD, lambda tensor: tensor + 1)
        os.utime(adapter / "adapter_model.safetensors", ns=(1, 1))
        with pytest.raises(AdapterUnavailableError, match="changed on disk since it was registered"):
            llm.generate([PROMPT], PARAMS, "a")
        shutil.copy(saved / "copies/adapter_model.safetensors", adapter)
        assert len(llm.generate([PROMPT], PARAMS, "a")[0].token_ids) == 1
