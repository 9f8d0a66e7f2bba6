"""What people hand over in place of a model, and the words it is refused with."""

import io
import json
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loraserve.errors import ModelError
from loraserve.loader import open_checkpoint
from safetensors.torch import save_file

from tests.loader.test_gguf_file import write_gguf
from tests.models.running import Running
from tests.models.tiny import make_model, save_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
HTML = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("llama"), tmp_path_factory.mktemp("whole"))


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


def put(name: str, content: bytes) -> Change:
    return lambda d: (d / name).write_bytes(content)


def rename(old: str, new: str) -> Change:
    return lambda d: (d / old).rename(d / new)


def drop(*names: str) -> Change:
    return lambda d: [(d / name).unlink() for name in names]


def into(*names: str) -> Change:
    """Everything moved to the first of these directories, and copied to the others."""

    def apply(directory: Path) -> None:
        files = list(directory.iterdir())
        for name in names:
            (directory / name).mkdir()
            for file in files:
                shutil.copy(file, directory / name)
        for file in files:
            file.unlink()

    return apply


def become_adapter(directory: Path) -> None:
    drop("config.json", "model.safetensors")(directory)
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, directory / "adapter_model.safetensors")


def add_adapter(directory: Path) -> None:
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def zipped(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model/config.json"))
    return buffer.getvalue()


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(3)}, buffer)
    return buffer.getvalue()


DIRECTORIES: list[tuple[str, Change, str]] = [
    ("pointer as weights", put("model.safetensors", POINTER), "model.safetensors is a git-lfs pointer"),
    ("pointer as config", put("config.json", POINTER), "config.json is a git-lfs pointer"),
    ("pointer as tokenizer", put("tokenizer.json", POINTER), "tokenizer.json is a git-lfs pointer"),
    ("pointer beside", put("generation_config.json", POINTER), "generation_config.json is a git-lfs"),
    ("page as weights", put("model.safetensors", HTML), "model.safetensors is an HTML page"),
    ("page as config", put("config.json", HTML), "config.json is an HTML page"),
    ("message as weights", put("model.safetensors", b"Entry not found"), 'begins with "Entry not found"'),
    ("message as config", put("config.json", b"Entry not found"), 'begins with "Entry not found"'),
    ("empty weights", put("model.safetensors", b""), "model.safetensors is empty: get the file itself again"),
    ("empty config", put("config.json", b""), "config.json is empty"),
    ("empty tokenizer", put("tokenizer.json", b""), "tokenizer.json is empty"),
    ("pickle as weights", put("model.safetensors", pickled()), "is a pickle, which is not loaded: convert"),
    ("GGUF as weights", put("model.safetensors", b"GGUF\3\0\0\0"), "model.safetensors is a GGUF file"),
    ("pickle", rename("model.safetensors", "pytorch_model.bin"), "holds pickled .bin weights, convert them"),
    (
        "adapter",
        become_adapter,
        "this is a LoRA adapter, not a model: serve its base model, which it names as",
    ),
    (
        "adapter with config",
        add_adapter,
        "holds adapter_config.json beside config.json, which transformers would apply",
    ),
    (
        "checkpoints below",
        into("checkpoint-500", "checkpoint-1000"),
        "models lie below it in checkpoint-500/, checkpoint-1000/: give one of those directories",
    ),
    (
        "shards without their index",
        rename("model.safetensors", "model-00001-of-00002.safetensors"),
        "model-00001-of-00002.safetensors is one of several shards, which need model.safetensors.index.json",
    ),
    (
        "GGUF inside",
        lambda d: [into("x")(d), shutil.rmtree(d / "x"), write_gguf(d / "a.gguf")],
        "it holds a GGUF file, give that itself",
    ),
    (
        "Meta's form",
        lambda d: [drop("config.json", "model.safetensors")(d), put("consolidated.00.pth", b"x")(d)],
        "Meta's or Mistral's own form (consolidated)",
    ),
    (
        "archive inside",
        lambda d: [into("x")(d), shutil.rmtree(d / "x"), put("model.zip", b"x")(d)],
        "model.zip is an archive: unpack it",
    ),
    ("nothing", lambda d: [into("x")(d), shutil.rmtree(d / "x")], "the directory is empty"),
    ("no config", drop("config.json"), "the directory holds"),
    (
        "only a SentencePiece model",
        lambda d: [drop("tokenizer.json")(d), put("tokenizer.model", b"x")(d)],
        "tokenizer.model is there, write tokenizer.json from it once",
    ),
]


@pytest.mark.parametrize(
    ("change", "words"), [case[1:] for case in DIRECTORIES], ids=[case[0] for case in DIRECTORIES]
)
def test_a_directory_that_is_no_model_is_refused_with_what_to_do(
    model: Path, change: Change, words: str
) -> None:
    change(model)
    with pytest.raises(ModelError, match=re.escape(words)):
        Running(model)


FILES: list[tuple[str, bytes, str]] = [
    (
        "model.safetensors",
        b"x",
        "expected a model directory or a .gguf file: give the directory that holds it",
    ),
    ("config.json", b"{}", "give the directory that holds it"),
    ("model.zip", zipped(["model/config.json"]), "it is a zip archive: unpack it"),
    ("model.tar", tarred(), "it is a tar archive: unpack it"),
    ("model.pt", pickled(), "it is a pickle"),
    ("model", b"GGUF\3\0\0\0", "it is a GGUF file"),
    ("model.gguf", POINTER, "model.gguf is a git-lfs pointer"),
    ("model.gguf", HTML, "model.gguf is an HTML page"),
    ("model.gguf", b"", "model.gguf is empty"),
    ("model.gguf", zipped(["model.gguf"]), "model.gguf is a zip archive"),
    ("model.gguf", bytes(64), "not a GGUF file"),
]


@pytest.mark.parametrize(("name", "content", "words"), FILES)
def test_a_file_that_is_no_model_is_refused_with_what_to_do(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(words)):
        open_checkpoint(tmp_path / name)


def test_a_gguf_adapter_is_no_model(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", edit=lambda writer: writer.add_type("adapter"))
    with pytest.raises(ModelError, match="is a GGUF adapter, not a model"):
        open_checkpoint(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_quantised_weights_are_refused_by_dtype(model: Path, dtype: torch.dtype) -> None:
    with open_checkpoint(model) as checkpoint:
        tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    tensors["model.embed_tokens.weight"] = torch.zeros(199, 64, dtype=dtype)
    save_file(tensors, model / "model.safetensors")
    words = f"dtype {dtype}, expected float32, bfloat16 or float16, or a quantization_config in config.json"
    with pytest.raises(ModelError, match=re.escape(words)):
        Running(model)
