"""How typed errors cross the network: error class ↔ gRPC status code and trailing metadata."""

from collections.abc import Iterable

import grpc

from loraserve.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    BatchFileError,
    CapacityError,
    DeadlineError,
    DeviceError,
    EngineStoppedError,
    GenerationConflictError,
    InvalidRequestError,
    LoraserveError,
    ModelError,
    NotFiniteError,
    NotStoredError,
    OverloadedError,
    OverloadReason,
    PermissionDeniedError,
    PromptTooLongError,
    ReplicaLostError,
    SourceUnavailableError,
    StateError,
    UnauthenticatedError,
)
from loraserve.validation.printable import printable

ERROR_CLASS_KEY = "loraserve-error"
RETRY_AFTER_KEY = "loraserve-retry-after-s"
REASON_KEY = "loraserve-reason"
GENERATION_KEY = "loraserve-generation"
MAX_MESSAGE_CHARS = 2000  # a status message travels in a header, and headers are limited to 8 KiB

STATUS_CODES: dict[type[LoraserveError], grpc.StatusCode] = {
    PromptTooLongError: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    AdapterFormatError: grpc.StatusCode.INVALID_ARGUMENT,
    ModelError: grpc.StatusCode.INVALID_ARGUMENT,
    AdapterNotFoundError: grpc.StatusCode.NOT_FOUND,
    NotStoredError: grpc.StatusCode.NOT_FOUND,
    GenerationConflictError: grpc.StatusCode.ABORTED,
    CapacityError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    SourceUnavailableError: grpc.StatusCode.UNAVAILABLE,
    AdapterUnavailableError: grpc.StatusCode.FAILED_PRECONDITION,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    EngineStoppedError: grpc.StatusCode.UNAVAILABLE,
    ReplicaLostError: grpc.StatusCode.UNAVAILABLE,
    DeviceError: grpc.StatusCode.INTERNAL,
    NotFiniteError: grpc.StatusCode.INTERNAL,
    StateError: grpc.StatusCode.INTERNAL,
    BatchFileError: grpc.StatusCode.INTERNAL,
}

_CLASSES_BY_NAME = {cls.__name__: cls for cls in STATUS_CODES}


def status_code(error: LoraserveError) -> grpc.StatusCode:
    """That of the first class in `STATUS_CODES` that the error is of, else INTERNAL."""
    for cls, code in STATUS_CODES.items():
        if isinstance(error, cls):
            return code
    return grpc.StatusCode.INTERNAL


def status_message(error: LoraserveError) -> str:
    """The error's text on one line, or as much of it as a status can carry."""
    return printable(str(error), MAX_MESSAGE_CHARS)


def error_metadata(error: LoraserveError) -> tuple[tuple[str, str], ...]:
    """What a status can't say, for the trailing metadata."""
    name = (ERROR_CLASS_KEY, type(error).__name__)
    if isinstance(error, OverloadedError):
        return name, (RETRY_AFTER_KEY, f"{error.retry_after_s:.3f}"), (REASON_KEY, error.reason)
    if isinstance(error, SourceUnavailableError | ReplicaLostError):
        return name, (RETRY_AFTER_KEY, f"{error.retry_after_s:.3f}")
    if isinstance(error, GenerationConflictError):
        return name, (GENERATION_KEY, str(error.generation))
    return (name,)


def typed_error(metadata: Iterable[tuple[str, str | bytes]], message: str) -> LoraserveError | None:
    """The error a server answered with, LoraserveError if its class is not known; None if no server did."""
    values = {key: value for key, value in metadata if isinstance(value, str)}
    if ERROR_CLASS_KEY not in values:
        return None
    cls = _CLASSES_BY_NAME.get(values[ERROR_CLASS_KEY], LoraserveError)
    retry_after_s = float(values.get(RETRY_AFTER_KEY, "1"))
    if cls is SourceUnavailableError or cls is ReplicaLostError:
        return cls(message, retry_after_s=retry_after_s)
    if cls is GenerationConflictError:
        return GenerationConflictError(message, generation=int(values.get(GENERATION_KEY, "0")))
    if cls is not OverloadedError:
        return cls(message)
    reason: OverloadReason = "adapter_loading" if values.get(REASON_KEY) == "adapter_loading" else "busy"
    return OverloadedError(message, retry_after_s=retry_after_s, reason=reason)
