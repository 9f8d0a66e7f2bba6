"""Chat templates see what transformers gives them: the same text for real templates and for each feature."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from loraserve.errors import InvalidRequestError
from loraserve.text.chat_template import ChatTemplate
from loraserve.text.tokenizer import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.chat_templates import CHATML, TEMPLATES

USER = {"role": "user", "content": "x<&>é \n"}
ANSWERED = [
    {"role": "user", "content": " 2+2? "},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "sure?"},
]
CHATS: Mapping[str, list[dict[str, Any]]] = {
    "one question": [USER],
    "system": [{"role": "system", "content": " Be brief. "}, USER],
    "several turns": ANSWERED,
    "system and turns": [{"role": "system", "content": "s"}, *ANSWERED],
    "two users": [USER, USER],
    "assistant first": [{"role": "assistant", "content": "hi"}, USER],
    "unknown role": [USER, {"role": "critic", "content": "no"}],
    "null fields": [{"role": "user", "content": "a", "tool_calls": None, "name": None}],
    "content is null": [USER, {"role": "assistant", "content": None, "tool_calls": None}, USER],
    "thinking": [
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes", "reasoning": "why"},
        USER,
        {"role": "assistant", "content": "no", "reasoning_content": "because"},
    ],
    "tool calls": [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"é": [1, "<"]}}}],
        },
        {"role": "tool", "content": "17"},
        {"role": "tool", "content": "18"},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
    ],
}

TOKENS: Mapping[str, Any] = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "sep_token": None,
    "image_token": "<image>",
    "call_token": "<call>",
    "extra_special_tokens": {"boi_token": "<boi>"},
}


def write_tokenizer(directory: Path, config: Mapping[str, Any]) -> Path:
    """A directory with a byte-level tokenizer of single characters, and `config` beside it."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def both(directory: Path) -> tuple[Tokenizer, Any]:
    return Tokenizer.from_directory(directory), PreTrainedTokenizerFast.from_pretrained(directory)


def theirs(tokenizer: Any, messages: Sequence[Any], **settings: Any) -> str | None:
    """What transformers renders, None where it refuses."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **settings))
    except Exception:  # a template may raise anything
        return None


def ours(tokenizer: Tokenizer, messages: Sequence[Any], **settings: Any) -> str | None:
    assert tokenizer.chat_template is not None
    try:
        return tokenizer.chat_template.render(messages, **settings)
    except InvalidRequestError:
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_transformers_renders_it(name: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, {**TOKENS, "chat_template": TEMPLATES[name]})
    found, expected = both(tmp_path)
    for chat in CHATS.values():
        for prompt in (True, False):
            assert ours(found, chat, add_generation_prompt=prompt) == theirs(
                expected, chat, add_generation_prompt=prompt
            )


def test_the_table_of_templates_renders_and_refuses(tmp_path: Path) -> None:
    """A table in which everything is refused would prove nothing."""
    rendered = {}
    for name, template in TEMPLATES.items():
        write_tokenizer(tmp_path, {**TOKENS, "chat_template": template})
        tokenizer = Tokenizer.from_directory(tmp_path)
        rendered[name] = [chat for chat in CHATS if ours(tokenizer, CHATS[chat]) is not None]
    never = {name for name, chats in rendered.items() if not chats}
    assert never == {
        "underscored namespace",
        "message changed",
        "type escape",
        "division by zero",
        "malformed",
    }
    assert "several turns" in rendered["llama 2"]
    assert "two users" not in rendered["llama 2"]
    assert "tool calls" in rendered["llama 3.1"]


@pytest.mark.parametrize(
    "variables", [{"enable_thinking": False}, {"bos_token": "B", "date_string": "today"}]
)
@pytest.mark.parametrize("name", ["qwen 3", "llama 3.1", "every special token"])
def test_further_variables_are_seen_over_the_models_own(
    name: str, variables: dict[str, Any], tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, {**TOKENS, "chat_template": TEMPLATES[name]})
    found, expected = both(tmp_path)
    rendered = ours(found, [USER], kwargs=variables)
    assert rendered == theirs(expected, [USER], add_generation_prompt=True, **variables)
    assert rendered is not None


CONTINUED = ["4 is", "4 is ", "", [{"type": "text", "text": "4 is"}], None, 4]


@pytest.mark.parametrize("content", CONTINUED)
@pytest.mark.parametrize("name", ["chatml", "llama 3", "zephyr", "mistral", "tojson", "dates"])
def test_the_final_message_is_continued_as_transformers_continues_it(
    name: str, content: Any, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, {**TOKENS, "chat_template": TEMPLATES[name]})
    found, expected = both(tmp_path)
    chat = [USER, {"role": "assistant", "content": content}]
    settings: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    assert ours(found, chat, **settings) == theirs(expected, chat, **settings)


class Hostile(str):
    def run(self) -> str:
        return "ran"


@pytest.mark.parametrize("value", [Hostile("x"), datetime(2020, 1, 2), {"a": Hostile("y")}, (1, True, 2.5)])
def test_a_template_sees_plain_data_only(value: Any, tmp_path: Path) -> None:
    write_tokenizer(
        tmp_path, {"chat_template": "{{ messages[0].content }}{{ messages[0].content.run is defined }}"}
    )
    found, expected = both(tmp_path)
    chat = [{"role": "user", "content": value}]
    assert ours(found, chat) == theirs(expected, chat)


@pytest.mark.parametrize("message", ["text", None, 3])
def test_a_message_that_is_no_mapping_is_refused(message: Any, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, {"chat_template": CHATML})
    with pytest.raises(InvalidRequestError, match="it must be a mapping with role and content"):
        Tokenizer.from_directory(tmp_path).apply_chat_template([message])


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "usr", "content": "a"}, "role of a message is 'usr', did you mean user?"),
        ({"role": "users", "content": "a"}, "did you mean user?"),
        ({"content": "a"}, "role of a message is None, it must be system, "),
        ({"role": 5, "content": "a"}, "role of a message is 5"),
        ({"role": "user", "contnt": "a"}, "a message has the unknown field 'contnt', did you mean content?"),
        ({"role": "user", "Content": "a"}, "did you mean content?"),
        ({"role": "user"}, "the message of role 'user' has no content, give it as text"),
        ({"role": "system", "content": None}, "the message of role 'system' has no content"),
        ({"role": "user", "content": 5}, "content of a message is 5, it must be text"),
        ({"role": "user", "content": True}, "content of a message is True, it must be text"),
    ],
    ids=str,
)
def test_a_slip_in_a_message_is_refused(message: dict[str, Any], text: str) -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    with pytest.raises(InvalidRequestError) as caught:
        template.render([message])
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": [{"type": "function"}]},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": {"temperature": 5}},
        {"role": "critic", "content": "a role of a template's own", "score": 5},
        {"role": "user", "content": ""},
    ],
    ids=str,
)
def test_messages_that_templates_know_are_taken(message: dict[str, Any]) -> None:
    ChatTemplate("{{ messages[0].content }}", {}).render([message])
