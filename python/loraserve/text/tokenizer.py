"""Tokenizer: text to token ids and back for one model, with its stop tokens and chat template."""

import copy
import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import tokenizers

from loraserve import _core
from loraserve.errors import InvalidRequestError, ModelError, PromptTooLongError
from loraserve.text.backend_errors import BackendCall
from loraserve.text.byte_level_bpe import BYTE_OF_CHAR, build_byte_level_bpe, find_pre_tokenizer
from loraserve.text.chat_template import ChatTemplate, Message
from loraserve.text.tokenizer_config import TokenizerConfig
from loraserve.validation.json_file import read_optional_json
from loraserve.validation.not_a_model import without_tokenizer
from loraserve.validation.values import token_ids

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # a byte, where SentencePiece has no token for a character
UNCOUNTED_TOKEN_NBYTES = 4  # texts of so many bytes for every token allowed are tokenised as a whole
PART_CHARS = 64 * 1024
MAX_TOKEN_ID = 2**24
# Names of special tokens as templates see them, and as GGUF spells them.
GGUF_TOKENS: Mapping[str, str] = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}

TokensIdentity: TypeAlias = "tuple[bytes, tuple[int, ...]]"
"""Which tokens there are and which of them end a sequence; what else differs are templates."""

ENCODING = BackendCall("the model's tokenizer can't encode this text", InvalidRequestError)
DECODING = BackendCall("the model's tokenizer can't decode these tokens", ModelError)
SETTING_UP = BackendCall("the model's tokenizer can't be used", ModelError)


class WholeTexts(dict[int, "str | None"]):
    """By token id, text that the token adds behind any whole characters; None where that is not certain.

    In a byte-level vocabulary most tokens are whole characters, and nothing is decoded to stream them. It has
    the backend and not the `Tokenizer`, which would be freed late if both had each other.
    """

    def __init__(self, backend: tokenizers.Tokenizer, added_ids: Collection[int]) -> None:
        super().__init__()
        self._backend = backend
        self._added_ids = added_ids

    def __missing__(self, token_id: int) -> str | None:
        text = self[token_id] = self._find(token_id)
        return text

    def _find(self, token_id: int) -> str | None:
        token = self._backend.id_to_token(token_id)
        if token is None or not self._is_byte_level or token_id in self._added_ids:
            return None
        values = [BYTE_OF_CHAR.get(char) for char in token]
        if None in values:
            return None
        text = bytes(value for value in values if value is not None).decode(errors="replace")
        return None if "\ufffd" in text else text

    @cached_property
    def _is_byte_level(self) -> bool:
        """Whether tokens are joined as bytes, and nothing else is done to them."""
        decoder = self._backend.decoder
        return decoder is not None and json.loads(decoder.__getstate__()).get("type") == "ByteLevel"


class Tokenizer:
    """Wraps a `tokenizers` tokenizer; safe to use from several threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: Sequence[int] = (),
        add_bos: bool | None = None,
        chat_template: str | None = None,
    ) -> None:
        """`add_bos` None leaves it to the backend's post-processor; no `eos_token_ids` means eos_token's.

        Raises ModelError: the backend can't encode.
        """
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._added_content = b""
        self._origin: Tokenizer | None = None
        self.vocab_size: int = backend.get_vocab_size()
        self.bos_token_id = self.id_of(special_tokens.get("bos_token"))
        eos = self.id_of(special_tokens.get("eos_token"))
        self.eos_token_ids = tuple(eos_token_ids) or token_ids(eos)
        added = backend.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        with SETTING_UP:
            self._adds_bos_itself = backend.encode("").ids[:1] == [self.bos_token_id]
        self._add_bos = self._adds_bos_itself if add_bos is None else add_bos
        self.special_tokens = dict(special_tokens)
        self.whole_texts: Mapping[int, str | None] = WholeTexts(backend, self._added_ids)
        self.chat_template = self.build_chat_template(chat_template) if chat_template else None

    @classmethod
    def from_directory(cls, path: Path) -> "Tokenizer":
        """Read tokenizer.json and what stands beside it. Raises ModelError."""
        backend = _read_backend(path)
        config = TokenizerConfig.from_directory(path, backend.padding)
        with SETTING_UP:
            config.add_tokens_to(backend)
        model = read_optional_json(path / "config.json")
        generation = read_optional_json(path / "generation_config.json")
        eos = generation.get("eos_token_id", model.get("eos_token_id"))
        return cls(
            backend,
            special_tokens=config.special_tokens,
            eos_token_ids=token_ids(eos),
            chat_template=config.chat_template,
        )

    def extended(
        self,
        tokens: Sequence[tokenizers.AddedToken],
        content: bytes,
        renamed: Mapping[str, str] | None = None,
    ) -> "Tokenizer":
        """A copy with further tokens, or tokens that match in another way; as large as this one.

        Args:
            tokens: new ones get the ids that follow, in order.
            content: tells it from other copies of this one.
            renamed: by their names here, tokens that nothing is cut into and that are now called otherwise.

        Raises ModelError.
        """
        text = self._backend.to_str()
        if renamed:
            fields = json.loads(text)
            vocab = fields["model"]["vocab"]
            vocab |= {new: vocab.pop(old) for old, new in renamed.items()}
            text = json.dumps(fields)
        with SETTING_UP:
            backend = tokenizers.Tokenizer.from_str(text)
            backend.add_tokens(list(tokens))
        other = Tokenizer(
            backend,
            special_tokens=self.special_tokens,
            eos_token_ids=self.eos_token_ids,
            add_bos=self._add_bos,
        )
        other.chat_template, other._added_content = self.chat_template, content
        return other

    def variant(
        self,
        *,
        eos_token_ids: Sequence[int],
        special_tokens: Mapping[str, str],
        chat_template: ChatTemplate | None,
    ) -> "Tokenizer":
        """The same tokens with other ends, other names of special tokens and another template.

        What is costly is shared; where prompts begin with a token of their own, they still do.
        """
        other = copy.copy(self)
        other._origin = self._origin or self
        other.eos_token_ids = tuple(eos_token_ids)
        other.special_tokens = dict(special_tokens)
        other.chat_template = chat_template
        return other

    @property
    def identity(self) -> TokensIdentity:
        """Of tokenizers of one model, equal where tokens and ends are."""
        return self._added_content, self.eos_token_ids

    @property
    def has_own_tokens(self) -> bool:
        """Whether it is, or stems from, an `extended` one."""
        return self._added_content != b""

    def added_tokens(self) -> dict[int, tokenizers.AddedToken]:
        """Tokens that are matched whole, by id."""
        return dict(self._backend.get_added_tokens_decoder())

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], eos_token_ids: Sequence[int]) -> "Tokenizer":
        """Build from a GGUF file's metadata. Raises ModelError."""
        add_bos = metadata.get("tokenizer.ggml.add_bos_token", find_pre_tokenizer(metadata).adds_bos)
        tokens = metadata.get("tokenizer.ggml.tokens", [])
        for key in ("add_eos_token", "add_sep_token"):
            if metadata.get(f"tokenizer.ggml.{key}"):
                raise ModelError(f"tokenizer.ggml.{key} is true, only false is supported")
        ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in GGUF_TOKENS.items()}
        return cls(
            build_byte_level_bpe(metadata),
            special_tokens={
                name: _token_at(tokens, GGUF_TOKENS[name], index)
                for name, index in ids.items()
                if index is not None
            },
            eos_token_ids=eos_token_ids,
            add_bos=bool(add_bos),
            chat_template=metadata.get("tokenizer.chat_template"),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of the text; special tokens (such as bos) are added as the model wants them.

        Runs without the GIL, as a batch does: a long text takes seconds. Raises InvalidRequestError: the
        tokenizer has no tokens for it.
        """
        return self._encode(text, add_special_tokens)

    def encode_pair(self, text: str, pair: str) -> list[int]:
        """As `encode` of two texts, put together as the tokenizer does."""
        return self._encode((text, pair))

    def _encode(self, text: str | tuple[str, str], add_special_tokens: bool = True) -> list[int]:
        with ENCODING:
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        if not add_special_tokens or self._add_bos == self._adds_bos_itself:
            return ids
        if not self._add_bos:
            return ids[1:]
        return ids if self.bos_token_id is None else [self.bos_token_id, *ids]

    def check_fits(self, text: str, max_num_tokens: int, what: str) -> None:
        """Refuse a text that is far too long soon, without tokenising all of it.

        One that passes may have some times as many tokens.

        Raises:
            PromptTooLongError: it has more tokens; `what` it is called.
            InvalidRequestError: it is no Unicode.
        """
        min_tokens = len(text) // self.max_token_len
        if min_tokens > max_num_tokens:
            raise PromptTooLongError(
                f"{what} has at least {min_tokens} tokens, the limit is {max_num_tokens}: send less"
            )
        try:
            nbytes = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"{what} is not valid Unicode: {error.reason}") from None
        if nbytes <= UNCOUNTED_TOKEN_NBYTES * max_num_tokens:
            return
        # The text in parts has about as many tokens as the whole: double that many can't be the limit.
        num_tokens = 0
        for start in range(0, len(text), PART_CHARS):
            num_tokens += len(self.encode(text[start : start + PART_CHARS], add_special_tokens=False))
            if num_tokens > 2 * max_num_tokens:
                raise PromptTooLongError(
                    f"{what} has more than {max_num_tokens} tokens, which is the limit: send less"
                )

    def encode_with_offsets(self, text: str, add_special_tokens: bool = True) -> list[tuple[int, int, int]]:
        """(token id, start, stop) of `encode`, in characters of the text; added tokens stand for none."""
        with ENCODING:
            (encoding,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        spans = [
            (index, start, stop) for index, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]
        if not add_special_tokens or self._add_bos == self._adds_bos_itself:
            return spans
        if not self._add_bos:
            return spans[1:]
        return spans if self.bos_token_id is None else [(self.bos_token_id, 0, 0), *spans]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD. Raises ModelError."""
        with DECODING:
            text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def decode_token(self, token_id: int) -> str:
        """Text that the token adds in the middle of a text; of a special one, its name."""
        if not self.is_text(token_id):
            return self.decode([token_id], skip_special_tokens=False)
        return self.decode([token_id, token_id]).removeprefix(self.decode([token_id]))

    def token_name(self, token_id: int) -> str:
        """The token's text, special or not; "" where there is no such token."""
        return self.decode([token_id], skip_special_tokens=False)

    def vocabulary_name(self, token_id: int) -> str:
        """As the vocabulary writes it, in its own alphabet; "" where there is no such token."""
        return self._backend.id_to_token(token_id) or ""

    def is_text(self, token_id: int) -> bool:
        """Whether the token is part of a text: it is known, and no special one."""
        return token_id not in self.special_ids and self._backend.id_to_token(token_id) is not None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which may be part of a character only."""
        text = self.decode([token_id], skip_special_tokens=False)
        token = self._backend.id_to_token(token_id) or ""
        values = [BYTE_OF_CHAR.get(char) for char in token]
        if "\ufffd" not in text or (None in values and not BYTE_TOKEN.fullmatch(token)):
            return text.encode()
        if BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(token[3:5])
        return bytes(value for value in values if value is not None)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        template: ChatTemplate | None = None,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] = MappingProxyType({}),
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Prompt text of a conversation, by `template` or else the model's own; see `ChatTemplate.render`.

        Raises InvalidRequestError if there is none, or it refuses the messages.
        """
        template = template or self.chat_template
        if template is None:
            raise InvalidRequestError("the model has no chat template, send a prompt instead of messages")
        return template.render(
            messages,
            add_generation_prompt,
            continue_final_message=continue_final_message,
            kwargs=kwargs,
            tools=tools,
        )

    def build_chat_template(self, source: str) -> ChatTemplate:
        """Another template for this model's tokens; `check` says whether it is one."""
        return ChatTemplate(source, self.special_tokens)

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of what `apply_chat_template` writes, special tokens included; its errors too."""
        text = self.apply_chat_template(messages, add_generation_prompt)
        return self.encode(text, add_special_tokens=False)

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        return self._backend.to_str()

    def to_text_json(self) -> str:
        """As `to_json`, with added tokens under names that no text holds: a text is made of the others."""
        import orjson  # noqa: PLC0415 (only grammars need it, and an engine does without their packages)

        whole = orjson.loads(self.to_json())
        model, added = whole["model"], whole["added_tokens"]
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", ()))
        merged = {"".join(pair) for pair in pairs}  # these are of text too
        whole["added_tokens"] = [token for token in added if token["content"] not in merged]
        names = {token["content"]: f"\x02{token['id']}\x03" for token in whole["added_tokens"]}
        for token in whole["added_tokens"]:
            token |= {"content": names[token["content"]], "special": True, "normalized": False}
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(text, text): token_id for text, token_id in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
        if model.get("unk_token") is not None:
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        whole["post_processor"] = None
        return orjson.dumps(whole).decode()

    @cached_property
    def max_token_len(self) -> int:
        """Characters of text the longest token stands for, at most."""
        return max(1, max(map(len, self._backend.get_vocab()), default=1))

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Tokens that stand for one byte, `<0xNN>`; the decoder looks at a run of them as a whole."""
        decoder = self._backend.decoder
        if decoder is None or b'"ByteFallback"' not in decoder.__getstate__():
            return frozenset()
        vocab = self._backend.get_vocab()
        return frozenset(vocab[name] for byte in range(256) if (name := f"<0x{byte:02X}>") in vocab)

    def id_of(self, token: str | None) -> int | None:
        """The id of one token's text, None if there is none."""
        return None if token is None else self._backend.token_to_id(token)

    def vocabulary(self) -> dict[str, int]:
        """Ids by text, added tokens among them."""
        return self._backend.get_vocab(with_added_tokens=True)


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{file} is missing: {without_tokenizer(path)}")
    try:
        with BackendCall(f"{file} can't be read", ModelError):
            backend = tokenizers.Tokenizer.from_file(str(file))
    except ModelError:
        foreign = _core.recognise_file(str(file), is_json=True)
        if foreign is not None:
            raise ModelError(f"{file} is {foreign}") from None
        raise
    highest = max(backend.get_vocab().values(), default=0)
    if highest > MAX_TOKEN_ID:  # the library walks over all ids below
        raise ModelError(f"{file} has the token id {highest}, the limit is {MAX_TOKEN_ID}")
    return backend


def _token_at(tokens: Sequence[str], key: str, token_id: int) -> str:
    if not 0 <= token_id < len(tokens):
        raise ModelError(
            f"tokenizer.ggml.{key}_token_id is {token_id}, the vocabulary has {len(tokens)} tokens"
        )
    return tokens[token_id]
