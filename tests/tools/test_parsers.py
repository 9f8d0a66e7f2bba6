"""Every family's answers, whole and cut at every place: the same calls, content and reasoning."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial

import pytest
from loraserve.request import Completion, Delta
from loraserve.tools.answer import AnswerParser
from loraserve.tools.families import CALLS, CALLS_BY_NAME, REASONING_BY_NAME

from tests.tools.examples import EXAMPLES, OPTIONS, Example

IDS = [f"{one.parser}-{index}" for index, one in enumerate(EXAMPLES)]


def parser_of(example: Example, *, begins_in_reasoning: bool = False) -> AnswerParser:
    reasoning = REASONING_BY_NAME.get(example.reasoning_parser)
    return AnswerParser(
        CALLS_BY_NAME[example.parser], reasoning, OPTIONS, begins_in_reasoning=begins_in_reasoning
    )


def assembled(parser: AnswerParser, pieces: Iterable[str]) -> Completion:
    """What a client puts together of the pieces."""
    whole = Completion()
    deltas = [parser.push(piece) for piece in pieces]
    for piece in [*deltas, parser.finish("")]:
        whole.append(Delta(0, piece.content, [], None, None, None, None, piece.reasoning, piece.tool_calls))
    return whole


def told(answer: Completion) -> tuple[list[tuple[str, str]], str, str]:
    return [(call.name, call.arguments) for call in answer.tool_calls], answer.text, answer.reasoning


@pytest.mark.parametrize("example", EXAMPLES, ids=IDS)
def test_example_says_what_it_says(example: Example) -> None:
    answer = assembled(parser_of(example), [example.text])
    calls = [
        (call.name, call.arguments if isinstance(expected, str) else json.loads(call.arguments))
        for call, (_, expected) in zip(answer.tool_calls, example.calls, strict=True)
    ]
    assert calls == example.calls
    assert (answer.text, answer.reasoning) == (example.content, example.reasoning)


@pytest.mark.parametrize("example", EXAMPLES, ids=IDS)
def test_however_it_is_cut_it_says_the_same(example: Example) -> None:
    text = example.text
    whole = told(assembled(parser_of(example), [text]))
    for at in range(1, len(text)):
        assert told(assembled(parser_of(example), [text[:at], text[at:]])) == whole
    for size in (1, 2, 3, 7):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert told(assembled(parser_of(example), pieces)) == whole


@pytest.mark.parametrize("example", EXAMPLES, ids=IDS)
def test_any_beginning_of_it_is_taken(example: Example) -> None:
    for end in range(len(example.text)):
        answer = assembled(parser_of(example), [example.text[:end]])
        assert len(answer.tool_calls) <= len(example.calls)


@pytest.mark.parametrize("example", [one for one in EXAMPLES if one.calls], ids=lambda one: one.parser)
def test_name_comes_first_and_arguments_in_pieces(example: Example) -> None:
    parser = parser_of(example)
    deltas = [delta for char in example.text for delta in parser.push(char).tool_calls]
    deltas += parser.finish("").tool_calls
    begun: list[int] = []
    for delta in deltas:
        if delta.name is not None:
            assert delta.id
            begun.append(delta.index)
        assert delta.index == begun[-1]
    assert begun == list(range(len(example.calls)))


@pytest.mark.parametrize("name", sorted(CALLS_BY_NAME))
def test_plain_text_is_left_as_it_is(name: str) -> None:
    for text in ("Hello, world.\n", "\n\n  spaces \n", "x < y, [1, 2] {a: b} `c`", ""):
        answer = assembled(AnswerParser(CALLS_BY_NAME[name], None, OPTIONS), text)
        assert told(answer) == ([], text, "")


def test_long_strings_come_before_their_end() -> None:
    parser = AnswerParser(CALLS_BY_NAME["hermes"], None, OPTIONS)
    parser.push('<tool_call>\n{"name": "get_weather", "arguments": {"city": "')
    for word in ("one ", "two ", "three "):
        (delta,) = parser.push(word).tool_calls
        assert delta.arguments == word


def test_ids_are_of_each_call_and_mistrals_of_nine_letters() -> None:
    example = next(one for one in EXAMPLES if one.parser == "mistral" and len(one.calls) == 2)
    ids = [call.id for call in assembled(parser_of(example), [example.text]).tool_calls]
    assert len(set(ids)) == 2
    assert all(len(one) == 9 and one.isalnum() for one in ids)


def test_reasoning_may_have_begun_in_the_prompt() -> None:
    example = Example("hermes", "", reasoning_parser="qwen3")
    answer = assembled(parser_of(example, begins_in_reasoning=True), "hm\n</think>\n\nyes")
    assert (answer.reasoning, answer.text) == ("hm", "yes")


PIECES = sorted({piece for one in EXAMPLES for piece in re.findall(r"<[^<>]*>|\w+|\W", one.text)})


@pytest.mark.parametrize("seed", range(40))
def test_mutated_answers_are_told_alike_however_cut(seed: int) -> None:
    draw = random.Random(seed)
    for example in draw.sample(EXAMPLES, 12):
        text = example.text
        for _ in range(draw.randint(1, 6)):
            at, length = draw.randrange(len(text) + 1), draw.randrange(8)
            text = text[:at] + draw.choice([*PIECES, "", "\\", '"', "'"]) + text[at + length :]
        whole = told(assembled(parser_of(example), [text]))
        for _ in range(6):
            cuts = sorted(draw.randrange(len(text) + 1) for _ in range(draw.randint(1, 9)))
            pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            assert told(assembled(parser_of(example), pieces)) == whole, (example.parser, text, pieces)


HOSTILE = [
    "<tool_call>" * 4000,
    "<tool_call>" + "[" * 20000,
    '<tool_call>{"name": "a", "arguments": ' + "[" * 20000,
    '<tool_call>{"name": "a", "arguments": {"b": "' + "\\" * 20000,
    '<tool_call>{"' + "a" * 20000,
    "<tool_cal" * 4000,
    "[" + "now()," * 4000,
    "[now(a=" + "[" * 20000,
    "[now(a='" + "\\x" * 10000,
    "[TOOL_CALLS]" * 4000,
    "<|channel|>" * 4000,
    "<|tool_call>call:a{b:" + "{c:" * 10000,
    "<function=a><parameter=b>" + "\n</parameter" * 4000,
    "<think>" + "</thin" * 4000,
    " " * 40000,
    "{" * 20000,
]


@pytest.mark.parametrize("format", CALLS, ids=lambda one: one.names[0])
def test_hostile_text_takes_steps_as_its_length(format: object) -> None:
    for text in HOSTILE:
        for name in ("none", "qwen3"):
            parser = parser_of(Example(format.names[0], "", reasoning_parser=name))  # type: ignore[attr-defined]
            pieces = [text[at : at + 4] for at in range(0, len(text), 4)]
            assert num_steps(partial(assembled, parser, pieces)) < 300 * len(pieces)


def num_steps(function: Callable[[], object]) -> int:
    """Calls of functions that this one makes."""
    count = 0

    def on_event(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(on_event)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count
