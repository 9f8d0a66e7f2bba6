"""How a chat becomes a prompt: equal to transformers, and refused where it would say something else."""

from __future__ import annotations

from typing import Any

import pytest
from loraserve.engine.prepared import prepare
from loraserve.errors import InvalidRequestError
from loraserve.loader import open_checkpoint
from loraserve.request import MAX_CHAT_TEMPLATE_CHARS, ChatOptions, GenerateRequest
from loraserve.text.tokenizer import Tokenizer
from loraserve.validation.did_you_mean import did_you_mean

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRIMMING = PLAIN.replace("m.content", "m.content | trim")
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ part.text }}|{% endfor %}{% endif %};{% endfor %}"
)
THINKING = PLAIN + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
GENERATION = (
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ style }}"
)

IN_PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
ENDINGS = ["The", " The ", "a\nb\n", "<b>é</b> 🙂", "hi"]


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: str) -> Tokenizer:
    with open_checkpoint(smollm2_path) as checkpoint:
        return checkpoint.load_tokenizer()


def chat(ending: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ending}]


def prompt_text(tokenizer: Tokenizer, messages: list[dict[str, Any]], **options: Any) -> str:
    request = GenerateRequest(messages=messages, chat=ChatOptions(**options))
    return tokenizer.decode(prepare(request, tokenizer, 2048).prompt_token_ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "ending"),
    [
        *((template, end) for template in (None, PLAIN, TRIMMING, THINKING, GENERATION) for end in ENDINGS),
        (PARTS, "The "),
        (PARTS, IN_PARTS),
        (PLAIN, IN_PARTS),
    ],
)
def test_a_continued_message_ends_the_prompt_as_in_transformers(
    tokenizer: Tokenizer, hf_smollm2_tokenizer: Any, template: str | None, ending: Any
) -> None:
    expected = hf_smollm2_tokenizer.apply_chat_template(
        chat(ending), chat_template=template, tokenize=False, continue_final_message=True
    )
    messages = chat(ending)
    found = prompt_text(tokenizer, messages, chat_template=template, continue_final_message=True)
    assert found == expected
    assert messages == chat(ending), "the caller's messages stay as they are"


@pytest.mark.parametrize("template", [None, PLAIN, THINKING])
@pytest.mark.parametrize("add", [True, False, None])
@pytest.mark.parametrize(
    "kwargs", [{}, {"enable_thinking": False}, {"enable_thinking": True}, {"bos_token": "B"}]
)
def test_options_reach_the_template_as_in_transformers(
    tokenizer: Tokenizer,
    hf_smollm2_tokenizer: Any,
    template: str | None,
    add: bool | None,
    kwargs: dict[str, Any],
) -> None:
    expected = hf_smollm2_tokenizer.apply_chat_template(
        chat("x"), chat_template=template, tokenize=False, add_generation_prompt=add is not False, **kwargs
    )
    found = prompt_text(
        tokenizer, chat("x"), chat_template=template, add_generation_prompt=add, template_kwargs=kwargs
    )
    assert found == expected


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"continue_final_message": True, "add_generation_prompt": True}, "both true"),
    ({"chat_template": "{% if"}, "malformed"),
    ({"chat_template": "{{ raise_exception('no') }}"}, "refused the messages: no"),
    ({"chat_template": 7}, "it must be a string"),
    ({"chat_template": "x" * (MAX_CHAT_TEMPLATE_CHARS + 1)}, f"the limit is {MAX_CHAT_TEMPLATE_CHARS}"),
    ({"chat_template": "no messages", "continue_final_message": True}, "does not show the final message"),
    ({"template_kwargs": {"messages": []}}, "beside chat_template_kwargs"),
    ({"template_kwargs": {"add_generation_prompt": False}}, "beside chat_template_kwargs"),
    ({"template_kwargs": {"chat_template": "x"}}, "beside chat_template_kwargs"),
    ({"template_kwargs": {"tokenize": False}}, "leave it out"),
    ({"template_kwargs": {str(i): i for i in range(65)}}, "65 names, the limit is 64"),
    ({"template_kwargs": ["x"]}, "it must be {name: value}"),
    (
        {"chat_template": THINKING, "template_kwargs": {"enable_thinkin": False}},
        "'enable_thinkin', which the chat template does not read, did you mean enable_thinking?",
    ),
    (
        {"chat_template": THINKING, "template_kwargs": {"enableThinking": False}},
        "did you mean enable_thinking?",
    ),
]


@pytest.mark.parametrize(("options", "text"), REFUSED)
def test_options_that_would_be_ignored_or_contradict_are_refused(
    tokenizer: Tokenizer, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        prompt_text(tokenizer, chat("x"), **options)
    assert text in str(caught.value)


def test_a_final_message_that_is_not_shown_as_it_is_can_not_be_continued(tokenizer: Tokenizer) -> None:
    for template in ("{{ messages[-1].content | upper }}", "content"):
        with pytest.raises(InvalidRequestError, match="does not show the final message"):
            prompt_text(tokenizer, chat("The"), chat_template=template, continue_final_message=True)


def test_a_final_message_without_text_can_not_be_continued(tokenizer: Tokenizer) -> None:
    for ending in (None, [], [{"type": "image"}]):
        with pytest.raises(InvalidRequestError, match="no text to continue"):
            prompt_text(tokenizer, chat(ending), continue_final_message=True)


def test_a_prompt_takes_no_chat_options(tokenizer: Tokenizer) -> None:
    request = GenerateRequest(prompt="x", chat=ChatOptions(continue_final_message=True))
    with pytest.raises(InvalidRequestError, match="they need messages"):
        prepare(request, tokenizer, 2048)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temprature", "temperature"),
        ("maxTokens", "max_tokens"),
        ("max-tokens", "max_tokens"),
        ("TEMPERATURE", "temperature"),
        ("stop_sequences", "stop"),
        ("zzz", ""),
        ("x" * 100_000, ""),
    ],
)
def test_a_likely_name_is_offered(name: str, meant: str) -> None:
    known = ("temperature", "max_tokens", "stop")
    hint = did_you_mean(name, known, {"stop_sequences": "stop"})
    assert hint == (f", did you mean {meant}?" if meant else "")
