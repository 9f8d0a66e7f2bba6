"""What lies beside an adapter's weights: named where it differs from the model's, and only there."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from loraserve import LLM
from loraserve.adapters.beside import BESIDE_FILES, BesideCheck
from loraserve.adapters.hub import ADAPTER_FILES
from loraserve.cli.main import main
from loraserve.server.http.admin.schema import ReceiptBody
from loraserve.text.tokenizer import Tokenizer
from loraserve.wire.messages import receipt_to_wire
from transformers import PreTrainedTokenizerFast

from tests.models.tiny import make_model, save_model
from tests.peft_writer import llama_shape, write_adapter

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
SHAPE = llama_shape(2, hidden=64, num_heads=4, num_kv_heads=2, head_dim=16, intermediate=96)

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer transformers wrote: w1 begins and w2 ends a sequence."""
    path = save_model(make_model("llama"), tmp_path_factory.mktemp("model"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"), bos_token="w1", eos_token="w2", unk_token="w0"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    """An adapter with all that a trainer saves beside it, as it is in the model."""
    path = write_adapter(tmp_path / "adapter", SHAPE)
    for name in BESIDE_FILES:
        if (model / name).is_file():
            shutil.copy(model / name, path)
    return path


def find_unused(model: Path, adapter: Path) -> list[str]:
    return BesideCheck(model, Tokenizer.from_directory(model)).find_unused(str(adapter))


def edit(name: str, **fields: Any) -> Change:
    def apply(path: Path) -> None:
        file = path / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(content | fields))

    return apply


def put(name: str, text: str) -> Change:
    return lambda path: (path / name).write_text(text)


def retokenize(change: Callable[[tokenizers.Tokenizer], object]) -> Change:
    def apply(path: Path) -> None:
        tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        change(tokenizer)
        tokenizer.save(str(path / "tokenizer.json"))

    return apply


SAME: list[Change] = [
    lambda path: None,
    lambda path: [(path / name).unlink(missing_ok=True) for name in BESIDE_FILES],
    put("chat_template.jinja", TEMPLATE + "\n"),
    edit("generation_config.json", eos_token_id=2, transformers_version="0"),
    edit("generation_config.json", eos_token_id=[2], pad_token_id=7),
    edit("added_tokens.json", w5=5),
    edit("tokenizer_config.json", pad_token="w2", model_max_length=4, add_eos_token=False),
    retokenize(lambda tokenizer: tokenizer.enable_padding(length=4, pad_id=2, pad_token="w2")),
    retokenize(lambda tokenizer: tokenizer.enable_truncation(4)),
    lambda path: (path / "tokenizer.json").write_text(
        json.dumps(json.loads((path / "tokenizer.json").read_text()), indent=7)
    ),
    put("README.md", "what it does"),
]


@pytest.mark.parametrize("change", SAME)
def test_what_says_the_same_as_the_model_is_not_named(model: Path, adapter: Path, change: Change) -> None:
    change(adapter)
    assert find_unused(model, adapter) == []


OTHER: list[tuple[Change, str]] = [
    (put("chat_template.jinja", "{{ messages }}"), "chat_template.jinja: a chat template of its own"),
    (
        lambda path: [
            (path / "chat_template.jinja").unlink(missing_ok=True),
            edit("tokenizer_config.json", chat_template="{{ messages }}")(path),
        ],
        "tokenizer_config.json: a chat template of its own",
    ),
    (edit("chat_template.json", chat_template="x"), "chat_template.json: a chat template of its own"),
    (
        edit("tokenizer_config.json", eos_token="w9"),
        "tokenizer_config.json: eos_token 'w9', the model's is 'w2'",
    ),
    (
        edit("tokenizer_config.json", bos_token="w9"),
        "tokenizer_config.json: bos_token 'w9', the model's is 'w1'",
    ),
    (edit("tokenizer_config.json", add_eos_token=True), "tokenizer_config.json: add_eos_token"),
    (
        edit("generation_config.json", eos_token_id=[2, 9]),
        "generation_config.json: end of sequence [2, 9], the model's is [2]",
    ),
    (
        edit("generation_config.json", temperature=0.6, top_k=20),
        "generation_config.json: temperature 0.6, top_k 20",
    ),
    (
        lambda path: [
            (path / "tokenizer_config.json").unlink(),
            edit("added_tokens.json", **{"<tool>": 199, "<\x1b[2J>": 200})(path),
        ],
        r"added_tokens.json: tokens the model does not have, '<tool>', '<\x1b[2J>'",
    ),
    (edit("generation_config.json", **{"\ud800": 1}), r"generation_config.json: \ud800 1"),
    (
        edit("tokenizer_config.json", additional_special_tokens=["<tool>"]),
        "tokenizer_config.json: tokens the model does not have, '<tool>'",
    ),
    (
        lambda path: [
            (path / "tokenizer_config.json").unlink(),
            put("special_tokens_map.json", '{"eos_token": {"content": "w9"}}')(path),
        ],
        "special_tokens_map.json: eos_token 'w9', the model's is 'w2'",
    ),
    (
        retokenize(lambda tokenizer: tokenizer.add_tokens(["<tool>"])),
        "tokenizer.json: another tokenizer, added_tokens differ from the model's",
    ),
    (
        lambda path: setattr_and_save(path, "normalizer", tokenizers.normalizers.Lowercase()),
        "tokenizer.json: another tokenizer, normalizer differ from the model's",
    ),
    (put("tokenizer_config.json", "{"), "a file that can't be read: "),
    (
        put("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n"),
        "tokenizer.json is a git-lfs pointer",
    ),
    (put("generation_config.json", " " * (2**24 + 1)), "generation_config.json: more than 16777216 bytes"),
]


def setattr_and_save(path: Path, part: str, value: Any) -> None:
    retokenize(lambda tokenizer: setattr(tokenizer, part, value))(path)


@pytest.mark.parametrize(("change", "words"), OTHER, ids=[case[1] for case in OTHER])
def test_what_differs_from_the_model_is_named(model: Path, adapter: Path, change: Change, words: str) -> None:
    change(adapter)
    assert any(words in line for line in find_unused(model, adapter)), find_unused(model, adapter)


def test_vocabulary_files_without_a_tokenizer_json_are_compared(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    other_model = shutil.copytree(model, tmp_path / "other")
    for path in (other_model, adapter):
        (path / "tokenizer.model").write_bytes(b"one")
    (adapter / "tokenizer.json").unlink()
    assert find_unused(other_model, adapter) == []
    (adapter / "tokenizer.model").write_bytes(b"two")
    assert find_unused(other_model, adapter) == ["tokenizer.model: another vocabulary"]


@pytest.fixture
def other_adapter(adapter: Path) -> Path:
    put("chat_template.jinja", "{{ messages }}")(adapter)
    return adapter


WORDS = "chat_template.jinja: a chat template of its own"


def test_everything_that_shows_an_adapter_names_what_is_not_used(
    model: Path, other_adapter: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "check", str(other_adapter), "--model", str(model)]) == 0
    assert f"not used   {WORDS}\n" in capsys.readouterr().out
    with (
        caplog.at_level(logging.WARNING, "loraserve.engine.engine"),
        LLM(str(model), dtype="float32", memory="16MiB", num_threads=1) as llm,
    ):
        receipt = llm.load_adapter("tuned", other_adapter)
        assert receipt.not_used == [WORDS]
        assert [adapter.receipt.not_used for adapter in llm.adapters()] == [[WORDS]]
    assert f"beside adapter tuned, not used: {WORDS}" in caplog.messages
    assert list(receipt_to_wire(receipt).not_used) == [WORDS]
    assert {"not_used", "base_copies"} <= ReceiptBody.model_fields.keys()


def test_what_is_compared_is_fetched_from_the_hub() -> None:
    assert set(BESIDE_FILES) <= set(ADAPTER_FILES)
