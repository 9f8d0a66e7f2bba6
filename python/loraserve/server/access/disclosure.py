"""What callers are shown of the server: its load and what others do, where files lie, and of a key neither.

Who administers sees everything. Where there are no keys, callers see what all do, but no path of the machine.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from loraserve.engine.stats import EngineInfo
from loraserve.errors import AdapterFormatError, AdapterUnavailableError
from loraserve.server.access.keys import Caller
from loraserve.v1 import loraserve_pb2 as pb

# Fields of EngineInfo that a client needs, and that neither move with the load nor tell of the machine.
INFO_FOR_ALL = frozenset(
    ("version", "dtype", "quantization", "adapter_dtype", "device", "max_model_len", "max_lora_rank")
)
ADAPTER_FOR_ALL = frozenset(("name", "generation", "description", "receipt"))


def shown_info(info: EngineInfo, caller: Caller) -> dict[str, Any]:
    """The fields of `info` that the caller may see."""
    return {name: value for name, value in asdict(info).items() if _shows_info(name, caller)}


def shown_info_message(message: pb.GetServerInfoResponse, caller: Caller) -> pb.GetServerInfoResponse:
    """As `shown_info`, with the other fields unset."""
    for field, _ in message.ListFields():
        if not _shows_info(field.name, caller):
            message.ClearField(field.name)
    return message


def shown_adapter_message(message: pb.Adapter, caller: Caller) -> pb.Adapter:
    """An adapter that the caller may use, with what the caller may not see unset."""
    if not caller.sees_paths:
        message.ClearField("path")
        message.receipt.ClearField("base_model")
        message.receipt.ClearField("notes")
        message.receipt.ClearField("not_used")
    if not caller.sees_load:
        for field, _ in message.ListFields():
            if field.name not in ADAPTER_FOR_ALL:
                message.ClearField(field.name)
    return message


def shown_generations_message(
    message: pb.ListGenerationsResponse, caller: Caller
) -> pb.ListGenerationsResponse:
    """Of an adapter that the caller may use, with what the caller may not see unset."""
    for one in message.generations:
        if not caller.sees_paths:
            one.ClearField("source")
        if not caller.sees_load:
            one.ClearField("num_requests")
            one.ClearField("shadow")
    return message


def shown_error(error: Exception, caller: Caller) -> Exception:
    """An error of an accepted request; why an adapter could not be loaded names files of the server."""
    if caller.sees_paths or not isinstance(error, AdapterFormatError | AdapterUnavailableError):
        return error
    return AdapterUnavailableError(
        "an adapter of this request can't be loaded now, the server's log says why"
    )


def _shows_info(name: str, caller: Caller) -> bool:
    if name == "model":
        return caller.sees_paths
    return caller.sees_load or name in INFO_FOR_ALL
