"""Tokenizer and chat template against transformers: same ids, same text, same prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from loraserve.errors import InvalidRequestError, ModelError
from loraserve.loader import open_checkpoint
from loraserve.text.byte_level_bpe import PRE_TOKENIZERS, build_byte_level_bpe
from loraserve.text.tokenizer import PART_CHARS, Tokenizer

from tests.fuzz.model_files import make_tokenizer
from tests.gil import ticking

CORPUS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "tabs\tand\nnew\r\nlines\n\n\n   indented",
    "numbers 0 7 42 2024 3.14159 1,000,000 -17 1e-9 ½ Ⅷ ²",
    "digits after spaces:  2   34    567\n\n8",
    "don't you're I'll we've he'd it's DON'T",
    "naïve café Ångström ﬁ \uff46\uff55\uff4c\uff4c e\u0301",
    "日本語のテキスト 中文 한국어 العربية עברית हिन्दी ไทย",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈🇫🇷 done",
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 2]}  # comment\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|not_a_token|>",
    "zero\u200bwidth\u00a0nbsp\u2028line\ufeffbom\x00nul\x7f",
    "a" * 300 + "!" * 50 + " " * 40,
    "SELECT * FROM t WHERE a >= 10 AND b <> 'x';",
    "https://example.com/a?b=c&d=%20#e",
]
CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}],
    [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "é<b>"},
        {"role": "user", "content": ""},
    ],
]


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: str) -> Tokenizer:
    with open_checkpoint(smollm2_path) as checkpoint:
        return checkpoint.load_tokenizer()


@pytest.mark.parametrize("text", CORPUS)
def test_ids_and_text_equal_transformers(text: str, tokenizer: Tokenizer, hf_smollm2_tokenizer: Any) -> None:
    ids = tokenizer.encode(text)
    assert ids == hf_smollm2_tokenizer.encode(text)
    for skip in (True, False):
        expected = hf_smollm2_tokenizer.decode(
            ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )
        assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_prompts_equal_transformers(
    messages: list[dict[str, str]],
    add_generation_prompt: bool,
    tokenizer: Tokenizer,
    hf_smollm2_tokenizer: Any,
) -> None:
    expected = hf_smollm2_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert tokenizer.apply_chat_template(messages, add_generation_prompt) == expected
    assert tokenizer.encode_chat(messages, add_generation_prompt) == hf_smollm2_tokenizer.encode(
        expected, add_special_tokens=False
    )


def test_a_directory_saved_by_transformers_reads_the_same(tmp_path: Path, hf_smollm2_tokenizer: Any) -> None:
    hf_smollm2_tokenizer.save_pretrained(tmp_path)
    saved = Tokenizer.from_directory(tmp_path)
    assert [saved.encode(text) for text in CORPUS] == [hf_smollm2_tokenizer.encode(text) for text in CORPUS]
    expected = hf_smollm2_tokenizer.apply_chat_template(CHATS[1], tokenize=False, add_generation_prompt=True)
    assert saved.apply_chat_template(CHATS[1]) == expected
    assert (saved.eos_token_ids, saved.bos_token_id) == ((2,), 1)


def test_stop_token_and_sizes_are_the_models(tokenizer: Tokenizer) -> None:
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_id, tokenizer.vocab_size) == ((2,), 1, 49152)


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("text", CORPUS)
def test_each_pre_tokenizer_cuts_as_the_models_own_does(name: str, text: str) -> None:
    from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs  # noqa: PLC0415

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": [*alphabet, "ab"],
        "tokenizer.ggml.merges": ["a b"],
    }
    described = {
        "tokens": metadata["tokenizer.ggml.tokens"],
        "merges": metadata["tokenizer.ggml.merges"],
        "pre_tokenizer_type": name,
        "tokenizer_type": "gpt2",
    }
    expected, _ = theirs.convert_gguf_tokenizer("llama", described)
    found = build_byte_level_bpe(metadata)
    if found.normalizer is not None:
        text = found.normalizer.normalize_str(text)
    assert found.pre_tokenizer.pre_tokenize_str(text) == expected.pre_tokenizer.pre_tokenize_str(text)


def test_a_sentencepiece_gguf_vocabulary_is_refused() -> None:
    with pytest.raises(ModelError, match=r"tokenizer.ggml.model 'llama' is not supported, supported is gpt2"):
        build_byte_level_bpe({"tokenizer.ggml.model": "llama"})


def test_only_llama_3_vocabularies_add_bos_unasked() -> None:
    assert [name for name, pre in PRE_TOKENIZERS.items() if pre.adds_bos] == [
        "llama-bpe",
        "llama3",
        "llama-v3",
    ]


def write_directory(directory: Path, config: dict[str, Any], adds_bos: bool = False) -> Path:
    vocab = {"<s>": 0, "</s>": 1, "hello": 2, "world": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="</s>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.enable_padding(length=8)
    backend.enable_truncation(3)
    if adds_bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"} | config))
    return directory


@pytest.mark.parametrize("file_adds_bos", [True, False])
@pytest.mark.parametrize(
    "config",
    [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True, "eos_token": "</s>"}],
)
def test_bos_is_added_as_transformers_adds_it(
    file_adds_bos: bool, config: dict[str, Any], tmp_path: Path
) -> None:
    """What tokenizer.json does to a prompt counts, whatever the config beside it says of bos and eos."""
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415  slow to import

    write_directory(tmp_path, config, file_adds_bos)
    tokenizer = Tokenizer.from_directory(tmp_path)
    expected = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected.backend_tokenizer.no_padding()
    expected.backend_tokenizer.no_truncation()
    assert tokenizer.encode("hello world") == expected.encode("hello world")
    assert tokenizer.encode("hello world")[0] == (0 if file_adds_bos else 2)
    assert tokenizer.encode("hello world", add_special_tokens=False) == [2, 3]


LISTED = {"content": "<new>", "special": True}
TOKEN_CONFIGS: dict[str, dict[str, Any]] = {
    "listed": {"added_tokens_decoder": {"5": {"content": "<b>"}, "4": LISTED}},
    "listed twice": {"added_tokens_decoder": {"4": LISTED, "0": {"content": "<s>", "special": True}}},
    "listed and named": {"added_tokens_decoder": {"4": {"content": "<new>"}}, "eos_token": "<new>"},
    "named": {"eos_token": "<eos>", "pad_token": {"__type": "AddedToken", "content": "<p>", "lstrip": True}},
    "extra": {"extra_special_tokens": ["<x>", "<y>"]},
    "additional": {"additional_special_tokens": ["<x>", {"__type": "AddedToken", "content": "<y>"}]},
    "additional and extra": {"additional_special_tokens": ["<x>"], "extra_special_tokens": ["<y>"]},
    "extra names": {
        "extra_special_tokens": {"image_token": "<img>"},
        "audio_token": "<a>",
        "add_bos_token": True,
    },
    "class": {"tokenizer_class": "PreTrainedTokenizerFast"},
}
MAPS: list[dict[str, Any]] = [
    {},
    {"bos_token": {"content": "<m>"}, "eos_token": "<e>", "additional_special_tokens": ["<q>"]},
]


@pytest.mark.parametrize("older", [{}, {"<eos>": 5, "<old>": 4}])
@pytest.mark.parametrize("special_map", MAPS, ids=["no map", "map"])
@pytest.mark.parametrize("name", TOKEN_CONFIGS)
def test_tokens_beside_the_vocabulary_are_those_of_transformers(
    name: str, special_map: dict[str, Any], older: dict[str, int], tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415  slow to import

    write_directory(tmp_path, TOKEN_CONFIGS[name])
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special_map))
    (tmp_path / "added_tokens.json").write_text(json.dumps(older))
    expected = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    found = Tokenizer.from_directory(tmp_path)
    assert (
        json.loads(found.to_json())["added_tokens"]
        == json.loads(expected.backend_tokenizer.to_str())["added_tokens"]
    )
    assert found.special_tokens == expected.special_tokens_map
    text = "hello <new> <b> <eos><p> <x><y> world"
    assert found.encode(text) == expected.encode(text, padding=False, truncation=False)


@pytest.mark.parametrize(
    ("tokenizer_class", "config"),
    [
        ("LlamaTokenizer", {}),
        ("LlamaTokenizerFast", {"eos_token": None}),
        ("GPT2Tokenizer", {"bos_token": "<s>"}),
        ("Qwen2Tokenizer", {"unk_token": None}),
        ("PreTrainedTokenizerFast", {}),
    ],
)
def test_tokens_left_out_are_those_of_transformers_class(
    tokenizer_class: str, config: dict[str, Any], tmp_path: Path
) -> None:
    import transformers  # noqa: PLC0415  slow to import

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": tokenizer_class, **config})
    )
    expected = getattr(transformers, tokenizer_class).from_pretrained(tmp_path)
    found = Tokenizer.from_directory(tmp_path)
    assert found.special_tokens == expected.special_tokens_map


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token": 3}, "eos_token is 3, it must be a string or an object with content"),
        ({"eos_token": {"id": 3}}, "a token is {'id': 3}, it needs a content"),
        ({"added_tokens_decoder": [1]}, r"added_tokens_decoder is \[1\], it must be an object of objects"),
        ({"added_tokens_decoder": {"4": "<a>"}}, "it must be an object of objects"),
        ({"added_tokens_decoder": {"four": {"content": "<a>"}}}, "invalid literal for int"),
        ({"added_tokens_decoder": {"4": {"content": "<a>", "lstrip": "yes"}}}, "lstrip|bool"),
        ({"chat_template": 3}, "chat_template is 3, it must be a string, or objects with name and template"),
        ({"chat_template": [{"name": "default"}]}, "it must be a string, or objects with name and template"),
        ({"chat_template": {"tool_use": "t"}}, "has the chat templates tool_use and no default"),
    ],
)
def test_a_tokenizer_config_that_cannot_be_read_is_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_directory(write_directory(tmp_path, config))


def test_ids_that_are_no_integers_are_refused(tmp_path: Path) -> None:
    write_directory(tmp_path, {})
    (tmp_path / "added_tokens.json").write_text('{"<late>": Infinity}')
    with pytest.raises(
        ModelError, match="added_tokens.json is {'<late>': inf}, it must be an object of token ids"
    ):
        Tokenizer.from_directory(tmp_path)


def edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A directory whose tokenizer.json is changed, as no library would write it."""
    value = json.loads(make_tokenizer().to_str())
    edit(value)
    (path / "tokenizer.json").write_text(json.dumps(value))
    return path


def test_a_post_processor_that_panics_is_one_error(tmp_path: Path) -> None:
    edited(tmp_path, lambda value: value["post_processor"]["special_tokens"].clear())
    with pytest.raises(ModelError, match="the model's tokenizer can't be used: "):
        Tokenizer.from_directory(tmp_path)


def test_a_model_that_panics_while_it_is_read_is_one_error(tmp_path: Path) -> None:
    edited(tmp_path, lambda value: value["model"].update(continuing_subword_prefix="##"))
    with pytest.raises(ModelError, match=r"tokenizer.json can't be read: "):
        Tokenizer.from_directory(tmp_path)


def test_a_token_of_a_very_high_id_is_refused(tmp_path: Path) -> None:
    edited(tmp_path, lambda value: value["model"]["vocab"].update(a=2**31))
    with pytest.raises(ModelError, match="has the token id 2147483648, the limit is 16777216"):
        Tokenizer.from_directory(tmp_path)


def test_a_vocabulary_of_nothing_has_tokens_of_some_length(tmp_path: Path) -> None:
    edited(
        tmp_path, lambda value: (value["model"].update(vocab={}, merges=[]), value.update(added_tokens=[]))
    )
    assert Tokenizer.from_directory(tmp_path).max_token_len == 1


def test_a_text_that_has_no_tokens_is_an_invalid_request(tmp_path: Path) -> None:
    edited(tmp_path, lambda value: value["model"].update(unk_token="gone", vocab={"a": 0}, merges=[]))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.decode([0]) == "a"
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(InvalidRequestError, match="can't encode this text: Unk token `gone` not found"):
            encode("b")


def test_saved_truncation_and_padding_do_not_apply(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path, {}))
    assert tokenizer.encode("hello " * 9) == [2] * 9


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "lstrip": False}])
def test_the_stop_token_may_come_from_the_tokenizer_config(eos: Any, tmp_path: Path) -> None:
    assert Tokenizer.from_directory(write_directory(tmp_path, {"eos_token": eos})).eos_token_ids == (1,)


ONE = [{"role": "user", "content": "x<&>é"}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s>x<&>é"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "x<&>é"}'),
        ("{%- for m in messages %}\n  {%- if m.role == 'user' %}u{% endif %}\n{%- endfor %}", "u"),
        ("{% for m in messages %}{% break %}{% endfor %}end", "end"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}", "user"),
        ("{{ strftime_now('%%') }}", "%"),
        ([{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}], "d"),
    ],
)
def test_templates_get_what_transformers_gives_them(template: Any, expected: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path, {"chat_template": template}))
    assert tokenizer.apply_chat_template(ONE) == expected


@pytest.mark.parametrize("further", [{}, {"tool_use": "t"}, {"default": "d"}])
@pytest.mark.parametrize(
    "template", ["config", {"default": "e"}, [{"name": "default", "template": "f"}], None]
)
@pytest.mark.parametrize("file", ["file", None])
def test_the_template_is_the_one_transformers_takes(
    file: str | None, template: Any, further: dict[str, str], tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415  slow to import

    write_directory(tmp_path, {"chat_template": template})
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file)
    for name, text in further.items():
        (tmp_path / "additional_chat_templates").mkdir(exist_ok=True)
        (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    try:
        expected = PreTrainedTokenizerFast.from_pretrained(tmp_path).apply_chat_template(ONE, tokenize=False)
    except ValueError:
        with pytest.raises((ModelError, InvalidRequestError), match="template"):
            Tokenizer.from_directory(tmp_path).apply_chat_template(ONE)
    else:
        assert Tokenizer.from_directory(tmp_path).apply_chat_template(ONE) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the model has no chat template, send a prompt instead"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "chat template refused the messages"),
        ("{{ messages[0].content + 1 }}", "chat template refused the messages"),
        ("{{ messages.append(1) }}", "chat template refused the messages"),
        ("{{ ''.__class__.__mro__ }}", "chat template refused the messages"),
    ],
)
def test_a_chat_that_cannot_be_rendered_is_an_invalid_request(
    template: str | None, message: str, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path, {"chat_template": template}))
    with pytest.raises(InvalidRequestError, match=message):
        tokenizer.apply_chat_template(ONE)


@pytest.mark.alone
@pytest.mark.parametrize("method", ["encode", "encode_with_offsets"])
def test_a_long_text_is_tokenised_without_the_gil(tokenizer: Tokenizer, method: str) -> None:
    text = "1" * 300_000  # which each is a token
    with ticking() as ticks:
        before = len(ticks)
        ids = getattr(tokenizer, method)(text)
        during = len(ticks) - before
    assert len(ids) == 300_000
    assert during > 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a" * 1_000_000, "prompt has at least 12345 tokens, the limit is 1000: send less"),
        ("1" * 80_000, "prompt has more than 1000 tokens, which is the limit: send less"),
        ("1, " * 25_000, "prompt has more than 1000 tokens, which is the limit: send less"),
        ("a\ud800", "prompt is not valid Unicode: surrogates not allowed"),
    ],
    ids=["characters", "digits", "numbers", "surrogate"],
)
def test_a_text_of_too_many_tokens_is_refused_before_it_is_tokenised_whole(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    encoded: list[int] = []
    encode = tokenizer.encode

    def remember(text: str, add_special_tokens: bool = True) -> list[int]:
        encoded.append(len(text))
        return encode(text, add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", remember)
    with pytest.raises(InvalidRequestError) as caught:
        tokenizer.check_fits(text, 1000, "prompt")
    assert str(caught.value) == message
    assert max(encoded, default=0) <= PART_CHARS


@pytest.mark.parametrize("num_repeats", [1, 100, 2000])
def test_a_text_that_fits_is_not_refused(tokenizer: Tokenizer, num_repeats: int) -> None:
    for text in CORPUS:
        long = text * num_repeats
        tokenizer.check_fits(long, max(len(tokenizer.encode(long)), 1), "prompt")
