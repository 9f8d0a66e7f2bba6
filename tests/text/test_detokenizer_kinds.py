"""Streaming equals decoding the whole as transformers does: every kind of tokenizer, prefix and split."""

from itertools import chain, takewhile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraserve.text.detokenizer import IncrementalDetokenizer
from loraserve.text.tokenizer import Tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁the", "▁", "▁▁", "▁▁▁▁", "tree", "▁é", "é", "日", "\ufffd", "▁🙂", ".", "<", "0x41"]
WORDS = ["the", "##s", "tree", ".", "##é", "日", ",", "'", "n't", "do"]


def build(model: Any, decoder: Any, *added: str) -> Backend:
    backend = Backend(model)
    backend.decoder = decoder
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken(text, normalized=False) for text in added])
    return backend


def bpe(pieces: list[str], **options: bool) -> models.BPE:
    names = dict.fromkeys(["<s>", "</s>", *pieces])
    return models.BPE({name: index for index, name in enumerate(names)}, [], **options)


def sentencepiece(*ending: Any) -> Backend:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ending]
    return build(bpe([*BYTES, *PIECES], byte_fallback=True), decoders.Sequence(steps), "<tool>", " plain ")


BYTE_LEVEL = sorted(pre_tokenizers.ByteLevel.alphabet())
WORD_IDS = {name: index for index, name in enumerate(["<s>", "</s>", "[UNK]", *WORDS])}
KINDS: dict[str, Backend] = {
    "byte-level BPE": build(
        bpe([*BYTE_LEVEL, "Ġthe", "ðŁ", "ĺĤ", "ï¿½"]), decoders.ByteLevel(), "<tool>", "é日", " plain "
    ),
    "Llama 2 (byte fallback, first space stripped)": sentencepiece(decoders.Strip(" ", 1, 0)),
    "Gemma (byte fallback, nothing stripped)": sentencepiece(),
    "Metaspace, always": build(bpe(PIECES), decoders.Metaspace(prepend_scheme="always"), "<tool>"),
    "Metaspace, first": build(bpe(PIECES), decoders.Metaspace(prepend_scheme="first"), "<tool>"),
    "Metaspace, never": build(bpe(PIECES), decoders.Metaspace(prepend_scheme="never"), "<tool>"),
    "Unigram": build(
        models.Unigram([(name, -1.0) for name in ["<s>", "</s>", "<unk>", *PIECES]], 2, False),
        decoders.Metaspace(),
    ),
    "WordPiece": build(models.WordPiece(WORD_IDS, unk_token="[UNK]"), decoders.WordPiece(), "<tool>"),
    "BPE with a suffix": build(bpe(["the</w>", "tr", "ee</w>", ".</w>"]), decoders.BPEDecoder("</w>")),
    "no decoder": build(bpe(PIECES), None),
}


def token_ids(backend: Backend) -> st.SearchStrategy[list[int]]:
    """Any tokens; runs of bytes as text has them, and ids that the tokenizer does not know."""
    vocab = backend.get_vocab()
    anything = st.integers(0, backend.get_vocab_size() + 3).map(lambda index: [index])
    names = BYTES if "<0x00>" in vocab else None
    if names is None and "Ġthe" in vocab:
        names = list(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).alphabet())
    if names is None:
        return st.lists(anything, max_size=24).map(lambda parts: [*chain(*parts)])

    def as_bytes(text: str) -> list[int]:
        if "<0x00>" in vocab:
            return [vocab[BYTES[byte]] for byte in text.encode()]
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        ((symbols, _),) = level.pre_tokenize_str(text)
        return [vocab[symbol] for symbol in symbols]

    characters = st.sampled_from("aé日🙂\ufffd ").map(as_bytes)
    cut = st.tuples(characters, st.integers(0, 3)).map(lambda pair: pair[0][: pair[1]])
    return st.lists(anything | characters | cut, max_size=24).map(lambda parts: [*chain(*parts)])


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_every_prefix_streams_to_what_decoding_it_gives(kind: str, data: st.DataObject) -> None:
    tokenizer = Tokenizer(KINDS[kind], special_tokens={})
    reference = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind])
    ids = data.draw(token_ids(KINDS[kind]))
    detokenizer, shown = IncrementalDetokenizer(tokenizer), ""
    for end, token in enumerate(ids, 1):
        shown += detokenizer.push([token])
        whole = reference.decode(ids[:end], skip_special_tokens=True)
        assert shown + detokenizer.flush() == whole
        if not set(ids[:end]) & tokenizer.byte_ids:
            assert shown in (whole, whole.removesuffix("\ufffd"))
    assert IncrementalDetokenizer(tokenizer).push(ids) == shown


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_an_answer_is_what_decoding_it_behind_its_prompt_adds(kind: str, data: st.DataObject) -> None:
    tokenizer = Tokenizer(KINDS[kind], special_tokens={})
    reference = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind])
    prompt, answer = data.draw(token_ids(KINDS[kind])), data.draw(token_ids(KINDS[kind]))
    detokenizer, shown = IncrementalDetokenizer(tokenizer, prompt), ""
    before = reference.decode(prompt, skip_special_tokens=True)
    for end, token in enumerate(answer, 1):
        shown += detokenizer.push([token])
        whole = reference.decode([*prompt, *answer[:end]], skip_special_tokens=True)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
        added = whole[len([*same]) :]
        assert shown + detokenizer.flush() == added


@pytest.mark.parametrize(
    ("kind", "prompt", "answer", "text"),
    [
        ("Llama 2 (byte fallback, first space stripped)", ["▁the"], ["▁the", "▁", "tree"], " the tree"),
        ("Llama 2 (byte fallback, first space stripped)", [], ["▁the", "tree"], "thetree"),
        ("Llama 2 (byte fallback, first space stripped)", ["<s>"], ["▁the", "tree"], "thetree"),
        ("Llama 2 (byte fallback, first space stripped)", ["<0xE6>", "<0x97>"], ["<0xA5>", "é"], "日é"),
        ("Metaspace, always", ["▁the"], ["▁the"], " the"),
        ("WordPiece", ["the"], ["tree", "##s", "."], " trees."),
    ],
)
def test_prompt_and_answer_join(kind: str, prompt: list[str], answer: list[str], text: str) -> None:
    vocab = KINDS[kind].get_vocab()
    tokenizer = Tokenizer(KINDS[kind], special_tokens={})
    detokenizer = IncrementalDetokenizer(tokenizer, [vocab[name] for name in prompt])
    assert detokenizer.push([vocab[name] for name in answer]) + detokenizer.flush() == text


def test_a_token_alone_has_the_text_that_it_has_in_a_text() -> None:
    vocab = KINDS["Llama 2 (byte fallback, first space stripped)"].get_vocab()
    tokenizer = Tokenizer(KINDS["Llama 2 (byte fallback, first space stripped)"], special_tokens={})
    for name, text in {
        "▁the": " the",
        "tree": "tree",
        "▁": " ",
        "<0x41>": "A",
        "<0xE6>": "\ufffd",
        "<s>": "<s>",
    }.items():
        assert tokenizer.decode_token(vocab[name]) == text
