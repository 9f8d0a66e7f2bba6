"""What lies beside an adapter's weights: used where it says something of its own, or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from loraserve import LLM
from loraserve.adapters import beside
from loraserve.adapters.beside import BESIDE_FILES, BesideReader
from loraserve.adapters.hub import ADAPTER_FILES
from loraserve.adapters.text import AdapterText
from loraserve.cli.main import main
from loraserve.errors import AdapterFormatError, CapacityError
from loraserve.server.http.admin.schema import ReceiptBody
from loraserve.text import shared_tokenizers
from loraserve.text.byte_level_bpe import BYTE_OF_CHAR
from loraserve.text.tokenizer import Tokenizer
from loraserve.wire.messages import receipt_to_wire
from transformers import PreTrainedTokenizerFast

from tests.models.tiny import make_model, save_model
from tests.peft_writer import llama_shape, write_adapter

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
OTHER_TEMPLATE = "{{ messages }}"
SHAPE = llama_shape(2, hidden=64, num_heads=4, num_kv_heads=2, head_dim=16, intermediate=96)
NUM_TOKENS = 195  # the model has 199 embeddings

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer transformers wrote: w1 begins, w2 ends a sequence; four embeddings are free."""
    path = save_model(make_model("llama"), tmp_path_factory.mktemp("model"))
    vocabulary = {f"w{index}": index for index in range(NUM_TOKENS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="w1", eos_token="w2", unk_token="w0"
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


def reader(model: Path) -> BesideReader:
    return BesideReader(model, Tokenizer.from_directory(model), 199, {})


def read(model: Path, adapter: Path, manifest_template: str | None = None) -> AdapterText:
    return reader(model).read(str(adapter), manifest_template)


def edit(name: str, **fields: Any) -> Change:
    def apply(path: Path) -> None:
        file = path / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(content | fields))

    return apply


def put(name: str, text: str) -> Change:
    def apply(path: Path) -> None:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)

    return apply


def without(*names: str) -> Change:
    return lambda path: [(path / name).unlink(missing_ok=True) for name in names]


def both(*changes: Change) -> Change:
    return lambda path: [change(path) for change in changes]


def retokenize(change: Callable[[tokenizers.Tokenizer], object]) -> Change:
    def apply(path: Path) -> None:
        tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        change(tokenizer)
        tokenizer.save(str(path / "tokenizer.json"))

    return apply


def add(*texts: str) -> Change:
    return retokenize(lambda tokenizer: tokenizer.add_tokens(list(texts)))


def rename(old: str, new: str) -> Change:
    def apply(path: Path) -> None:
        file = path / "tokenizer.json"
        file.write_text(file.read_text().replace(f'"{old}"', f'"{new}"'))

    return apply


SAME: list[Change] = [
    lambda path: None,
    without(*BESIDE_FILES),
    put("chat_template.jinja", TEMPLATE + "\n"),
    edit("generation_config.json", eos_token_id=2, transformers_version="0"),
    edit("generation_config.json", eos_token_id=[2], pad_token_id=7),
    edit("added_tokens.json", w2=2),
    edit("tokenizer_config.json", pad_token="w2", model_max_length=4, add_eos_token=False),
    retokenize(lambda tokenizer: tokenizer.enable_padding(length=4, pad_id=2, pad_token="w2")),
    retokenize(lambda tokenizer: tokenizer.enable_truncation(4)),
    lambda path: (path / "tokenizer.json").write_text(
        json.dumps(json.loads((path / "tokenizer.json").read_text()), indent=7)
    ),
    put("README.md", "what it does"),
]


@pytest.mark.parametrize("change", SAME)
def test_what_says_the_same_as_the_model_costs_nothing(model: Path, adapter: Path, change: Change) -> None:
    change(adapter)
    own = reader(model)
    text = own.read(str(adapter))
    assert text == AdapterText(tokenizer=own._base)
    assert text.tokenizer is own._base


USED: list[tuple[Change, str]] = [
    (
        put("chat_template.jinja", OTHER_TEMPLATE),
        "template: chat_template.jinja renders this adapter's chats",
    ),
    (
        both(without("chat_template.jinja"), edit("tokenizer_config.json", chat_template=OTHER_TEMPLATE)),
        "template: tokenizer_config.json renders this adapter's chats",
    ),
    (
        both(
            without("chat_template.jinja"),
            edit(
                "tokenizer_config.json",
                chat_template=[
                    {"name": "default", "template": OTHER_TEMPLATE},
                    {"name": "rag", "template": "x"},
                ],
            ),
        ),
        "template: tokenizer_config.json renders this adapter's chats",
    ),
    (
        edit("tokenizer_config.json", eos_token="w9"),
        "end of sequence: 'w2' (2), 'w9' (9), of generation_config.json and tokenizer_config.json",
    ),
    (
        both(
            without("tokenizer_config.json"),
            put("special_tokens_map.json", '{"eos_token": {"content": "w9", "lstrip": false}}'),
        ),
        "end of sequence: 'w2' (2), 'w9' (9), of generation_config.json and special_tokens_map.json",
    ),
    (
        edit("generation_config.json", eos_token_id=[7, 9]),
        "end of sequence: 'w7' (7), 'w9' (9), of generation_config.json",
    ),
    (
        edit("generation_config.json", temperature=0.6, top_k=20),
        "sampling: temperature 0.6, top_k 20, of generation_config.json",
    ),
    (
        edit("tokenizer_config.json", additional_special_tokens=["w5"]),
        "tokens: tokenizer.json matches in a way of its own 'w5' (5)",
    ),
    (add("<tool>", "</tool>"), "tokens: tokenizer.json adds '<tool>' (195), '</tool>' (196)"),
    (
        edit("tokenizer_config.json", additional_special_tokens=["<tool>"]),
        "tokens: tokenizer.json adds '<tool>' (195)",
    ),
    (
        both(
            without("tokenizer.json", "tokenizer_config.json"),
            edit("added_tokens.json", **{"<\x1b[2J>": 195}),
        ),
        r"tokens: added_tokens.json adds '<\x1b[2J>' (195)",
    ),
    (
        both(
            *map(add, ("<a>", "<b>", "<c>", "<d>", "[PAD]")), edit("tokenizer_config.json", pad_token="[PAD]")
        ),
        "tokens: '[PAD]' (199) only pads, has no embedding and is left out",
    ),
]


@pytest.mark.parametrize(("change", "words"), USED, ids=[case[1] for case in USED])
def test_what_an_adapter_says_of_its_own_is_used(
    model: Path, adapter: Path, change: Change, words: str
) -> None:
    change(adapter)
    text = read(model, adapter)
    assert any(line.startswith(words) for line in text.notes), text.notes


NOT_USED: list[tuple[Change, str]] = [
    (edit("chat_template.json", chat_template="x"), "chat_template.json: a chat template, of a processor"),
    (put("additional_chat_templates/rag.jinja", "x"), "chat_template.jinja: templates rag, the default one"),
    (edit("tokenizer_config.json", add_eos_token=True), "tokenizer_config.json: add_eos_token"),
    (
        edit("generation_config.json", eos_token_id=[2, 4000]),
        "generation_config.json: end of sequence [4000]",
    ),
    (
        retokenize(lambda tokenizer: setattr(tokenizer, "normalizer", tokenizers.normalizers.Lowercase())),
        "tokenizer.json: normalizer differ from the model's",
    ),
]


@pytest.mark.parametrize(("change", "words"), NOT_USED, ids=[case[1] for case in NOT_USED])
def test_what_differs_and_is_not_used_is_named(
    model: Path, adapter: Path, change: Change, words: str
) -> None:
    change(adapter)
    text = read(model, adapter)
    assert any(line.startswith(words) for line in text.not_used), text.not_used


REFUSED: list[tuple[Change, str]] = [
    (rename("w7", "other"), "tokenizer.json: token 7 is 'other', the model's is 'w7', and 0 more differ"),
    (
        both(without("tokenizer.json"), put("vocab.json", '{"w0": 0, "other": 7}')),
        "vocab.json: token 7 is 'other', the model's is 'w7'",
    ),
    (
        retokenize(
            lambda tokenizer: setattr(
                tokenizer,
                "model",
                tokenizers.models.WordLevel(
                    {f"w{index}": index for index in range(NUM_TOKENS + 3)}, unk_token="w0"
                ),
            )
        ),
        "tokenizer.json: another vocabulary, with 3 tokens that the model's does not have",
    ),
    (
        add("<a>", "<b>", "<c>", "<d>", "<e>"),
        r"added tokens '<e>' \(199\) lie beyond the model's 199 embeddings",
    ),
    (
        both(
            add("<a>", "<b>", "<c>", "<d>", "[PAD]"),
            edit("tokenizer_config.json", pad_token="[PAD]"),
            put("chat_template.jinja", "{{ messages }}[PAD]"),
        ),
        r"added tokens '\[PAD\]' \(199\) lie beyond",
    ),
    (
        both(
            add("<a>", "<b>", "<c>", "<d>", "<end>"),
            edit("tokenizer_config.json", pad_token="<end>", eos_token="<end>"),
        ),
        r"added tokens '<end>' \(199\) lie beyond",
    ),
    (put("chat_template.jinja", "{% if %}"), "the chat template is malformed"),
    (put("chat_template.jinja", "x" * (2**20 + 1)), "a chat template of .* can't be read"),
    (
        both(without("chat_template.jinja"), edit("tokenizer_config.json", chat_template="x" * (2**20 + 1))),
        "the chat template has 1048577 characters, the limit is 1048576",
    ),
    (
        both(
            without("chat_template.jinja"),
            edit("tokenizer_config.json", chat_template=[{"name": "rag", "template": "x"}]),
        ),
        "has the chat templates rag and no default",
    ),
    (edit("generation_config.json", num_beams=4), "num_beams 4, which is not supported"),
    (edit("generation_config.json", temperature="hot"), "temperature is 'hot'"),
    (edit("generation_config.json", eos_token_id="w2"), "token ids are 'w2'"),
    (edit("tokenizer_config.json", eos_token=5), "eos_token is 5, it must be a string"),
    (put("tokenizer_config.json", "{"), "tokenizer_config.json can't be read"),
    (
        put("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n"),
        "tokenizer.json is a git-lfs pointer",
    ),
    (put("generation_config.json", " " * (2**24 + 1)), "generation_config.json has more than 16777216 bytes"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=[case[1] for case in REFUSED])
def test_what_contradicts_the_model_or_can_not_be_read_is_refused(
    model: Path, adapter: Path, change: Change, words: str
) -> None:
    change(adapter)
    with pytest.raises(AdapterFormatError, match=words):
        read(model, adapter)


def test_a_manifests_template_wins_and_the_directorys_is_named(model: Path, adapter: Path) -> None:
    put("chat_template.jinja", "{% if %}")(adapter)  # not even looked at
    text = read(model, adapter, OTHER_TEMPLATE)
    assert text.template_from == "loraserve.json"
    assert text.tokenizer.chat_template is not None
    assert text.tokenizer.chat_template.source == OTHER_TEMPLATE
    assert text.not_used == ("chat_template.jinja: loraserve.json has the chat template",)


def test_a_generation_config_is_left_out_where_none_is_to_count(model: Path, adapter: Path) -> None:
    edit("generation_config.json", temperature=0.6, num_beams=4, eos_token_id=9)(adapter)
    text = BesideReader(model, Tokenizer.from_directory(model), 199, None).read(str(adapter))
    assert text.sampling_defaults == {}
    assert text.tokenizer.eos_token_ids == (9,)


def test_vocabulary_files_without_a_tokenizer_json_are_compared(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    other_model = shutil.copytree(model, tmp_path / "other")
    for path in (other_model, adapter):
        (path / "tokenizer.model").write_bytes(b"one")
    (adapter / "tokenizer.json").unlink()
    assert read(other_model, adapter).not_used == ()
    (adapter / "tokenizer.model").write_bytes(b"two")
    assert read(other_model, adapter).not_used == ("tokenizer.model: another vocabulary",)


def test_tokenizers_are_shared_by_what_is_added_and_freed_with_the_last_user(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    add("<tool>")(adapter)
    other = shutil.copytree(adapter, tmp_path / "other")
    put("chat_template.jinja", OTHER_TEMPLATE)(other)
    own = reader(model)
    one, two = own.read(str(adapter)), own.read(str(other))
    assert one.tokenizer._backend is two.tokenizer._backend
    assert one.tokenizer.identity == two.tokenizer.identity != own._base.identity
    assert one.tokenizer.encode("w3 <tool>") == [3, 195]
    assert own._base.encode("w3 <tool>") == [3, 0]
    assert len(own._shared) == 1
    del one, two
    assert len(own._shared) == 0


def test_more_different_tokenizers_than_the_limit_are_refused(
    model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_tokenizers, "MAX_TOKENIZERS", 1)
    own = reader(model)
    add("<a>")(adapter)
    first = own.read(str(adapter))
    add("<b>")(adapter)
    with pytest.raises(CapacityError, match="have 1 different sets of added tokens, the limit is 1: unload"):
        own.read(str(adapter))
    del first
    assert own.read(str(adapter)).num_added == 2


def test_findings_are_forgotten_before_they_grow_without_bound(
    model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "MAX_KNOWN_TOKENS", 2)
    own = reader(model)
    for name in ("<a>", "<b>", "<c>"):
        add(name)(adapter)
        own.read(str(adapter))
        assert len(own._known) <= 2


def test_embeddings_that_a_gguf_file_gives_placeholders_are_free(adapter: Path, tmp_path: Path) -> None:
    texts = [*BYTE_OF_CHAR, "ab", "<end>"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({text: i for i, text in enumerate(texts)}, [("a", "b")])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    backend.add_tokens(["<tool>"])
    without(*BESIDE_FILES)(adapter)
    backend.save(str(adapter / "tokenizer.json"))
    base = Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.tokens": [*texts, "[PAD258]", "[PAD259]"],
            "tokenizer.ggml.token_type": [1] * 257 + [3, 5, 5],
            "tokenizer.ggml.merges": ["a b"],
        },
        [257],
    )
    text = BesideReader(tmp_path / "model.gguf", base, 260, {}).read(str(adapter))
    assert text.notes == ("tokens: tokenizer.json adds '<tool>' (258)",)
    assert text.tokenizer.encode("a<tool>")[1:] == [258]
    assert text.tokenizer.decode([258]) == "<tool>"
    assert text.tokenizer.encode("<end>") == [257]
    assert base.id_of("<tool>") is None


@pytest.fixture
def other_adapter(adapter: Path) -> Path:
    put("chat_template.jinja", OTHER_TEMPLATE)(adapter)
    edit("tokenizer_config.json", add_eos_token=True)(adapter)
    edit("adapter_config.json", base_model_name_or_path=None)(adapter)
    return adapter


NOTE = "template: chat_template.jinja renders this adapter's chats"
WORDS = "tokenizer_config.json: add_eos_token, prompts do not end with it here"


def test_everything_that_shows_an_adapter_names_what_is_used_and_what_is_not(
    model: Path, other_adapter: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "check", str(other_adapter), "--model", str(model)]) == 0
    assert f"not used   {WORDS}\n" in capsys.readouterr().out
    with (
        caplog.at_level("INFO", "loraserve.engine.servable"),
        LLM(str(model), dtype="float32", memory="16MiB", num_threads=1) as llm,
    ):
        receipt = llm.load_adapter("tuned", other_adapter)
        assert (receipt.notes, receipt.not_used) == ([NOTE], [WORDS])
        assert [adapter.receipt.not_used for adapter in llm.adapters()] == [[WORDS]]
    assert f"adapter tuned: {NOTE}" in caplog.messages
    assert f"beside adapter tuned, not used: {WORDS}" in caplog.messages
    assert list(receipt_to_wire(receipt).not_used) == [WORDS]
    assert list(receipt_to_wire(receipt).notes) == [NOTE]
    assert {"not_used", "notes", "base_copies"} <= ReceiptBody.model_fields.keys()


def test_what_is_compared_is_fetched_from_the_hub() -> None:
    assert set(BESIDE_FILES) <= set(ADAPTER_FILES)
