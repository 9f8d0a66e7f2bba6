"""`loraserve adapters verify` says whether an adapter's answers are PEFT's, and whether it does anything."""

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve.cli.main import main
from loraserve.cli.verification import Answer, PeftReference
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.e2e.tiny import make_tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, hf_smollm2_tokenizer: Any) -> Path:
    """`model`, and adapters of it: `plain`, `invoked` (aLoRA), `added` (tokens), `empty` (B is zero)."""
    path = tmp_path_factory.mktemp("verify")
    make_tiny_model(path / "model", hf_smollm2_tokenizer)
    for name, changes in {
        "plain": {},
        "invoked": {"alora_invocation_tokens": hf_smollm2_tokenizer.encode(" is")},
        "added": {"trainable_token_indices": [len(hf_smollm2_tokenizer), len(hf_smollm2_tokenizer) + 1]},
        "empty": {"init_lora_weights": True},
    }.items():
        base = AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32)
        if name == "added":
            base.resize_token_embeddings(len(hf_smollm2_tokenizer) + 2, mean_resizing=False)
        torch.manual_seed(1)
        settings: dict[str, Any] = {"init_lora_weights": False, "target_modules": "all-linear", **changes}
        peft = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
        peft.save_pretrained(path / name, save_embedding_layers=False)
    return path


def verify(saved: Path, adapter: str, *more: str) -> int:
    return main(["adapters", "verify", str(saved / adapter), "--model", str(saved / "model"), *more])


@pytest.mark.parametrize("adapter", ["added", "invoked", "plain"])
def test_an_adapter_that_is_served_as_peft_computes_it_is_equal(
    saved: Path, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(saved, adapter, "--max-tokens", "4") == 0
    shown = capsys.readouterr().out
    assert "EQUAL: every token is PEFT's" in shown
    assert shown.count("PEFT       the same") == 6
    assert "The adapter moves the base model's log-probabilities by up to" in shown


def test_an_adapter_that_changes_nothing_is_named_as_such(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello\n\nThe sum of 1 and 2\n")
    assert verify(saved, "empty", "--max-tokens", "3", "--prompts", str(prompts)) == 0
    shown = capsys.readouterr().out
    assert shown.count("prompt  ") == 2
    assert "The adapter changes nothing" in shown


def test_answers_of_another_adapter_are_different(
    saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(saved / "plain", tmp_path / "other")
    file = other / "adapter_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file)
    from loraserve.cli import verification  # noqa: PLC0415

    serve = verification.serve

    def serve_other(config: Any, *args: Any) -> list[Answer]:
        return serve(dataclasses.replace(config, adapters={verification.NAME: str(other)}), *args)

    monkeypatch.setattr(verification, "serve", serve_other)
    assert verify(saved, "plain", "--max-tokens", "4") == 1
    shown = capsys.readouterr().out
    assert "DIFFERENT: " in shown
    assert " …\n" in shown


def test_a_token_that_peft_would_not_choose_is_found(saved: Path) -> None:
    reference = PeftReference(saved / "model", str(saved / "plain"))
    (position,) = reference.compare(Answer([5, 6, 7], [8], [[(8, 0.0)]]))
    if position.peft_token_id == 8:
        pytest.fail("choose another token")
    assert position.differs
    assert position.error > 1


def test_missing_libraries_are_named(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert verify(saved, "plain", "--max-tokens", "1") == 1
    assert "pip install 'loraserve[verify]'" in capsys.readouterr().err


def test_names_that_peft_does_not_find_are_no_difference(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(saved / "plain", tmp_path / "other")
    file = other / "adapter_model.safetensors"
    renamed = {
        name.replace("model.model.", "model.model._orig_mod."): t for name, t in load_file(file).items()
    }
    save_file(renamed, file)
    assert main(["adapters", "verify", str(other), "--model", str(saved / "model"), "--max-tokens", "1"]) == 1
    shown = capsys.readouterr()
    assert "PEFT does not find all of this adapter under the names it has in the file" in shown.err
    assert "DIFFERENT" not in shown.out


def test_prompts_are_the_chats_of_the_adapters_own_template(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(saved / "plain", tmp_path / "other")
    (other / "chat_template.jinja").write_text(
        "{% for m in messages %}QUESTION {{ m.content }} ANSWER{% endfor %}"
    )
    assert main(["adapters", "verify", str(other), "--model", str(saved / "model"), "--max-tokens", "1"]) == 0
    assert capsys.readouterr().out.count("ANSWER'") == 6


def test_files_without_prompts_are_refused(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    assert verify(saved, "plain", "--prompts", str(tmp_path / "empty.txt")) == 1
    assert "has no prompts: write one per line" in capsys.readouterr().err
    assert verify(saved, "plain", "--prompts", str(tmp_path / "missing.txt")) == 1
    assert "prompts can't be read" in capsys.readouterr().err
    (tmp_path / "many.txt").write_text("again\n" * 1001)
    assert verify(saved, "plain", "--prompts", str(tmp_path / "many.txt")) == 1
    assert "has 1001 prompts, the limit is 1000" in capsys.readouterr().err
