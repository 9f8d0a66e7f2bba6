"""Messages of typed errors: printable lines, whatever a file or a caller has put into them."""

import loraserve
import pytest
from loraserve.errors import MAX_LINE_CHARS, LoraserveError, ModelError

CLASSES = sorted((LoraserveError, *LoraserveError.__subclasses__()), key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls.__module__ == "loraserve.errors"])
def test_what_is_put_into_a_message_begins_no_line_and_moves_no_cursor(cls: type[LoraserveError]) -> None:
    assert str(cls("a name is \x1b[2K\u202e\nforged\ud800")) == r"a name is \x1b[2K\u202e\nforged\ud800"
    assert str(cls("plain é")) == "plain é"


def test_a_message_has_a_line_an_argument_each_of_bounded_length() -> None:
    assert str(ModelError("first", "second\n")) == "first\nsecond\\n"
    assert len(str(ModelError("x" * 10**6))) == MAX_LINE_CHARS
    assert str(ModelError()) == ""
    assert issubclass(ModelError, loraserve.errors.LoraserveError)
