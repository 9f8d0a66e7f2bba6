"""Builds the byte-level BPE tokenizer a GGUF file describes in its metadata."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from loraserve.errors import ModelError
from loraserve.text.backend_errors import BackendCall

# GPT-2's alphabet: printable characters of Latin-1 stand for themselves, the other bytes for what follows it.
_PRINTABLE: Final = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS: Final = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF_CHAR: Final[Mapping[str, int]] = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + index): byte for index, byte in enumerate(_OTHERS)
}

CONTROL: Final = 3
USER_DEFINED: Final = 4


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before merging; `splits` are applied one after another, then GPT-2's if asked."""

    splits: tuple[str, ...] = ()
    gpt2_split: bool = False
    nfc: bool = False
    whole_words_first: bool = False
    adds_bos: bool = False


_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_TAIL: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+|"

_GPT2: Final = PreTokenizer(gpt2_split=True)
_LLAMA3: Final = PreTokenizer(
    splits=(_CONTRACTIONS + _WORD + r"\p{N}{1,3}" + _TAIL,), whole_words_first=True, adds_bos=True
)
_QWEN2: Final = PreTokenizer(splits=(_CONTRACTIONS + _WORD + r"\p{N}" + _TAIL,), nfc=True)
_SMOLLM: Final = PreTokenizer(splits=(r"\p{N}",), gpt2_split=True)

# By `tokenizer.ggml.pre`; the names and what they stand for are llama.cpp's.
PRE_TOKENIZERS: Final[Mapping[str, PreTokenizer]] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def find_pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    """The pre-tokenizer the metadata names. Raises ModelError if the tokenizer is of another kind."""
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ModelError(
            f"tokenizer.ggml.model {model!r} is not supported, supported is gpt2; "
            "load the model from its Hugging Face directory instead"
        )
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise ModelError(
            f"tokenizer.ggml.pre {name!r} is not supported, supported are {', '.join(PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[name]


def build_byte_level_bpe(metadata: Mapping[str, Any]) -> Tokenizer:
    """Vocabulary, merges and added tokens of the metadata. Raises ModelError."""
    pre = find_pre_tokenizer(metadata)
    tokens = _list(metadata, "tokenizer.ggml.tokens")
    merges = [_pair(merge) for merge in _list(metadata, "tokenizer.ggml.merges")]
    vocab = {token: index for index, token in enumerate(tokens)}
    with BackendCall("tokenizer.ggml.merges does not fit the vocabulary", ModelError):
        tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.whole_words_first))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_steps(pre))
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type", []))
    return tokenizer


def _steps(pre: PreTokenizer) -> list[pre_tokenizers.PreTokenizer]:
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.splits]
    return [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.gpt2_split)]


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Control tokens are special (skipped when decoding); user-defined ones only match whole."""
    pairs = list(zip(tokens, kinds, strict=False))
    special = [AddedToken(token, special=True, normalized=False) for token, kind in pairs if kind == CONTROL]
    plain = [AddedToken(token, normalized=False) for token, kind in pairs if kind == USER_DEFINED]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _list(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value:
        raise ModelError(f"metadata has no {key}")
    return value
