"""How typed errors cross the network: error class ↔ gRPC status code and trailing metadata."""

import grpc

from loraserve.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    CapacityError,
    DeviceError,
    EngineStoppedError,
    InvalidRequestError,
    LoraserveError,
    ModelError,
)

ERROR_CLASS_KEY = "loraserve-error"
MAX_MESSAGE_CHARS = 2000  # a status message travels in a header, and headers are limited to 8 KiB

STATUS_CODES: dict[type[LoraserveError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    AdapterFormatError: grpc.StatusCode.INVALID_ARGUMENT,
    ModelError: grpc.StatusCode.INVALID_ARGUMENT,
    AdapterNotFoundError: grpc.StatusCode.NOT_FOUND,
    CapacityError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    AdapterUnavailableError: grpc.StatusCode.FAILED_PRECONDITION,
    EngineStoppedError: grpc.StatusCode.UNAVAILABLE,
    DeviceError: grpc.StatusCode.INTERNAL,
}

_CLASSES_BY_NAME = {cls.__name__: cls for cls in STATUS_CODES}


class ListenError(LoraserveError):
    """The server can't listen on the address it was given."""


def status_code(error: LoraserveError) -> grpc.StatusCode:
    for cls, code in STATUS_CODES.items():
        if isinstance(error, cls):
            return code
    return grpc.StatusCode.INTERNAL


def status_message(error: LoraserveError) -> str:
    """The error's text, or as much of it as a status can carry."""
    text = str(error)
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 1] + "…"


def typed_error(class_name: str, message: str) -> LoraserveError:
    """The error a server answered with; LoraserveError where its class is not known here."""
    return _CLASSES_BY_NAME.get(class_name, LoraserveError)(message)
