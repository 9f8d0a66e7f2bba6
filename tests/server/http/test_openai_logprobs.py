"""Log-probabilities of tokens that are parts of characters, or whose texts are the same."""

from typing import Any

import pytest
from loraserve.request import TokenLogprob
from loraserve.server.http.openai.logprobs import chat_logprobs, completion_logprobs
from loraserve.server.http.token_texts import TokenTexts
from loraserve.text.tokenizer import Tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

EURO = "€".encode()  # three bytes, three tokens


def byte_level() -> Tokenizer:
    """A token for each byte, as GPT-2 spells them, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(backend, special_tokens={"eos_token": "<end>"})


def byte_fallback() -> Tokenizer:
    """SentencePiece's way: characters, and bytes as <0xE2>."""
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "é", "▁a"]
    model = models.BPE({name: index for index, name in enumerate(names)}, [], byte_fallback=True)
    backend = Backend(model)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return Tokenizer(backend, special_tokens={})


def ids_of(tokenizer: Tokenizer, text: bytes) -> list[int]:
    return [next(index for index in range(256) if tokenizer.token_bytes(index) == bytes([b])) for b in text]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_every_single_byte_is_found_again(make: Any) -> None:
    tokenizer = make()
    texts = TokenTexts(tokenizer)
    assert sorted(bytes(texts.utf8(index)) for index in range(256)) == [bytes([b]) for b in range(256)]


def test_characters_keep_their_bytes_beside_fallback_bytes() -> None:
    tokenizer = byte_fallback()
    assert [tokenizer.token_bytes(256 + index).decode() for index in range(4)] == [" ", "a", "é", " a"]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_the_bytes_of_a_chats_tokens_are_those_of_its_text(make: Any) -> None:
    tokenizer = make()
    texts = TokenTexts(tokenizer)
    ids = ids_of(tokenizer, EURO)
    content = chat_logprobs([TokenLogprob(token_id, -1.0, []) for token_id in ids], texts)["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]) == EURO


def test_likeliest_tokens_of_one_text_stay_apart() -> None:
    tokenizer = byte_level()
    texts = TokenTexts(tokenizer)
    first, second, third = ids_of(tokenizer, EURO)
    (letter,) = ids_of(tokenizer, b"a")
    top = [(first, -0.5), (letter, -1.0), (second, -1.5), (third, -2.5)]
    assert texts.text(first) == texts.text(second) == "\ufffd"
    (found,) = completion_logprobs([TokenLogprob(second, -1.5, top)], texts, 0)["top_logprobs"]
    assert found == {
        "\ufffd": -1.5,  # the chosen one, as in `tokens`
        f"token_id:{first}": -0.5,
        "a": -1.0,
        f"token_id:{third}": -2.5,
    }


def test_a_special_token_has_the_bytes_of_its_name() -> None:
    tokenizer = byte_level()
    assert tokenizer.token_bytes(tokenizer.eos_token_ids[0]) == b"<end>"
