"""`loraserve adapters stamp` binds an adapter to the weights it was trained on."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM
from loraserve.cli.main import main
from loraserve.errors import AdapterFormatError
from safetensors.torch import load_file, save_file

MANIFEST = {"stop": [";"], "description": "größer als SQL", "sampling": {"temperature": 0.0}}


@pytest.fixture
def adapter(tiny_adapters: dict[str, str], tmp_path: Path) -> Path:
    path = shutil.copytree(tiny_adapters["a1"], tmp_path / "adapter")
    (path / "loraserve.json").write_text(json.dumps(MANIFEST, ensure_ascii=False))
    return path


@pytest.fixture
def other_model(tiny_model: tuple[Path, torch.nn.Module], tmp_path: Path) -> Path:
    """The same model after a training of one norm."""
    path = shutil.copytree(tiny_model[0], tmp_path / "other")
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] += 0.01
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def stamp(adapter: Path, model: Path, *more: str) -> int:
    return main(["adapters", "stamp", str(adapter), "--model", str(model), *more])


def llm(model: Path, adapters: dict[str, str]) -> LLM:
    return LLM(str(model), adapters, dtype="float32", memory="8MiB", max_num_seqs=2)


def set_config(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_stamp_keeps_what_is_there_and_binds_the_adapter_to_its_base(
    adapter: Path,
    tiny_model: tuple[Path, torch.nn.Module],
    other_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model[0]
    assert stamp(adapter, model) == 0
    with llm(model, {"a": str(adapter)}) as served:
        fingerprint = served.info().base_fingerprint
        assert served.adapters()[0].receipt.notes == []
    assert capsys.readouterr().out == f"{adapter} is stamped for {fingerprint}\n"
    text = (adapter / "loraserve.json").read_text()
    assert list(json.loads(text).items()) == [*MANIFEST.items(), ("base_fingerprint", fingerprint)]
    assert "größer" in text
    assert sorted(os.listdir(adapter)) == sorted({*os.listdir(adapter)} - {"loraserve.json.new"})
    with llm(other_model, {}) as served:
        other = served.info().base_fingerprint
        assert other != fingerprint
        with pytest.raises(AdapterFormatError, match=f"stamped for base {fingerprint}.*served is {other}"):
            served.load_adapter("a", adapter)
        assert served.adapters() == []
    assert main(["adapters", "check", str(adapter), "--model", str(other_model)]) == 1
    assert fingerprint in capsys.readouterr().err
    assert main(["adapters", "check", str(adapter), "--model", str(model)]) == 0
    assert "base       the one it is stamped for\n" in capsys.readouterr().out


def test_another_stamp_is_replaced_only_when_that_is_asked_for(
    adapter: Path,
    tiny_model: tuple[Path, torch.nn.Module],
    other_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert stamp(adapter, tiny_model[0]) == 0
    before = (adapter / "loraserve.json").read_bytes()
    assert stamp(adapter, tiny_model[0]) == 0
    assert "is already stamped for" in capsys.readouterr().out
    assert stamp(adapter, other_model) == 1
    assert "--replace stamps it anew" in capsys.readouterr().err
    assert (adapter / "loraserve.json").read_bytes() == before
    assert stamp(adapter, other_model, "--replace") == 0
    assert " was stamped for base1:" in capsys.readouterr().out
    with llm(other_model, {"a": str(adapter)}) as served:
        assert [one.name for one in served.adapters()] == ["a"]


def test_what_is_no_manifest_or_does_not_fit_is_not_stamped(
    adapter: Path, tiny_model: tuple[Path, torch.nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    (adapter / "loraserve.json").write_text('{"stop": 3}')
    assert stamp(adapter, tiny_model[0]) == 1
    (adapter / "loraserve.json").write_text('{"base_fingerprint": "mine"}')
    assert stamp(adapter, tiny_model[0]) == 1
    assert "base_fingerprint is 'mine'" in capsys.readouterr().err
    (adapter / "loraserve.json").unlink()
    set_config(adapter, r=99, rank_pattern={})
    assert stamp(adapter, tiny_model[0]) == 1
    assert not (adapter / "loraserve.json").exists()


def test_a_stamp_goes_where_the_manifest_of_a_checkpoint_below_is_read(
    adapter: Path, tiny_model: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    (adapter / "loraserve.json").unlink()
    shutil.copytree(adapter, tmp_path / "run/checkpoint-7")
    assert stamp(tmp_path / "run", tiny_model[0]) == 0
    assert (tmp_path / "run/checkpoint-7/loraserve.json").exists()
    (tmp_path / "run/checkpoint-7/loraserve.json").rename(tmp_path / "run/loraserve.json")
    assert stamp(tmp_path / "run", tiny_model[0]) == 0
    assert not (tmp_path / "run/checkpoint-7/loraserve.json").exists()


def test_an_adapter_whose_config_names_another_base_is_served_with_a_warning_everywhere(
    adapter: Path,
    tiny_model: tuple[Path, torch.nn.Module],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_config(adapter, base_model_name_or_path="other/model")
    with caplog.at_level(logging.INFO, "loraserve"), llm(tiny_model[0], {"a": str(adapter)}) as served:
        (note,) = served.adapters()[0].receipt.notes
    assert note.startswith("base: its config names 'other/model', served is ")
    assert [(one.levelname, one.getMessage()) for one in caplog.records if "base:" in one.getMessage()] == [
        ("WARNING", f"adapter a: {note}")
    ]
    assert main(["adapters", "check", str(adapter), "--model", str(tiny_model[0])]) == 0
    shown = capsys.readouterr().out
    assert "base       ANOTHER by name: its config names 'other/model'\n" in shown
    assert f"note       {note}\n" in shown
    assert stamp(adapter, tiny_model[0]) == 0
    assert "names 'other/model'" in capsys.readouterr().out
    with llm(tiny_model[0], {"a": str(adapter)}) as served:
        assert served.adapters()[0].receipt.notes == []
