"""How many values a message may have: told from its bytes, since parsing runs on the server's loop."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from loraserve import _core
from loraserve.errors import InvalidRequestError

UNCOUNTED_NBYTES = 64 * 1024  # parsed in less time than a step takes, whatever they hold
MAX_OBJECTS = 64 * 1024  # messages and texts: 8,192 turns of a chat, and what they are made of
MAX_NUMBERS = 2**20  # such as token ids
_VARINTS = (
    FieldDescriptor.TYPE_INT32,
    FieldDescriptor.TYPE_INT64,
    FieldDescriptor.TYPE_UINT32,
    FieldDescriptor.TYPE_UINT64,
    FieldDescriptor.TYPE_BOOL,
    FieldDescriptor.TYPE_ENUM,
)


def counter(message: Descriptor) -> Callable[[bytes], None]:
    """A check of the bytes of such a message, not yet parsed.

    What it returns raises InvalidRequestError: they hold more values than are parsed in a moment.
    """
    shape = _shape(message)

    def check(data: bytes) -> None:
        if len(data) <= UNCOUNTED_NBYTES:
            return
        num_objects, num_numbers = shape.count(data, MAX_OBJECTS, MAX_NUMBERS)
        for number, limit, what in (
            (num_objects, MAX_OBJECTS, "messages and texts"),
            (num_numbers, MAX_NUMBERS, "numbers"),
        ):
            if number > limit:
                raise InvalidRequestError(
                    f"the message has more than {limit} {what}, which is the limit: send less at once"
                )

    return check


def _shape(message: Descriptor) -> _core.MessageShape:
    """Needs a message that does not contain itself."""
    return _core.MessageShape(
        {field.number: _shape(field.message_type) for field in message.fields if field.message_type},
        [field.number for field in message.fields if field.type in _VARINTS],
    )
