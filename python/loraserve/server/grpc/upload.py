"""The messages of an upload: a head first, then nothing but data."""

from __future__ import annotations

from collections.abc import AsyncIterator

from loraserve.errors import InvalidRequestError
from loraserve.v1 import loraserve_pb2 as pb
from loraserve.wire.messages import check_known


async def upload_head(messages: AsyncIterator[pb.UploadAdapterRequest]) -> pb.UploadAdapterHead:
    """Raises InvalidRequestError: the stream does not begin with a head."""
    async for message in messages:
        check_known(message)
        if message.WhichOneof("part") == "head":
            return message.head
        break
    raise InvalidRequestError("an upload begins with a head: name, config_json")


async def upload_data(messages: AsyncIterator[pb.UploadAdapterRequest]) -> AsyncIterator[bytes]:
    """What follows the head. Raises InvalidRequestError: it is no data."""
    async for message in messages:
        check_known(message)
        if message.WhichOneof("part") != "data":
            raise InvalidRequestError("an upload has data after its head, and one head")
        yield message.data
