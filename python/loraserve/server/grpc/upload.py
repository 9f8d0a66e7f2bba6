"""The messages of an upload: a head first, then nothing but data."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from loraserve.errors import DeadlineError, InvalidRequestError
from loraserve.v1 import loraserve_pb2 as pb
from loraserve.wire.messages import check_known

IDLE_LIMIT_S = 60.0  # between two messages


async def upload_head(messages: AsyncIterator[pb.UploadAdapterRequest]) -> pb.UploadAdapterHead:
    """Raises InvalidRequestError: the stream does not begin with a head; DeadlineError: nothing comes."""
    async for message in _timely(messages):
        if message.WhichOneof("part") == "head":
            return message.head
        break
    raise InvalidRequestError("an upload begins with a head: name, config_json")


async def upload_data(messages: AsyncIterator[pb.UploadAdapterRequest]) -> AsyncIterator[bytes]:
    """What follows the head. Raises InvalidRequestError: it is no data; DeadlineError: nothing comes."""
    async for message in _timely(messages):
        if message.WhichOneof("part") != "data":
            raise InvalidRequestError("an upload has data after its head, and one head")
        yield message.data


async def _timely(messages: AsyncIterator[pb.UploadAdapterRequest]) -> AsyncIterator[pb.UploadAdapterRequest]:
    while True:
        try:
            message = await asyncio.wait_for(anext(messages), IDLE_LIMIT_S)
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError:
            raise DeadlineError(
                f"nothing of the upload has come for {IDLE_LIMIT_S:g} s, send it again"
            ) from None
        check_known(message)
        yield message
