"""Answers that end in the middle: no part of a mark, and no call without a name, is content."""

import pytest
from loraserve.tools.answer import AnswerParser
from loraserve.tools.families import CALLS_BY_NAME, REASONING_BY_NAME

from tests.tools.examples import EXAMPLES, OPTIONS, Example

WITHOUT_MARKS = ("llama3_json", "pythonic")  # where what begins a call may be anything
CALLING = [one for one in EXAMPLES if one.calls and one.parser not in WITHOUT_MARKS and not one.reasoning]


@pytest.mark.parametrize("example", CALLING, ids=lambda one: f"{one.parser}-{EXAMPLES.index(one)}")
def test_content_of_a_cut_answer_begins_that_of_the_whole(example: Example) -> None:
    calls = CALLS_BY_NAME[example.parser]
    whole = AnswerParser(calls, None, OPTIONS).finish(example.text)
    for length in range(len(example.text)):
        cut = AnswerParser(calls, None, OPTIONS).finish(example.text[:length], is_cut=True)
        assert whole.content.startswith(cut.content), example.text[:length]
        pieces = AnswerParser(calls, None, OPTIONS)
        content = "".join(pieces.push(char).content for char in example.text[:length])
        assert content + pieces.finish("", is_cut=True).content == cut.content


def test_an_answer_that_is_not_cut_keeps_what_looks_like_a_mark() -> None:
    calls = CALLS_BY_NAME["hermes"]
    for text in ("3 <", "a <tool", '<tool_call>\n{"na'):
        assert AnswerParser(calls, None, OPTIONS).finish(text).content == text


def test_reasoning_that_is_cut_in_its_end_mark_has_none_of_it() -> None:
    parser = AnswerParser(None, REASONING_BY_NAME["qwen3"], OPTIONS)
    piece = parser.finish("<think>\nhm </thi", is_cut=True)
    assert (piece.reasoning, piece.content) == ("hm", "")
