"""Every error loraserve raises on purpose; each says what was wrong, the limit and the remedy."""

from typing import Literal, TypeAlias

from loraserve.validation.printable import printable

OverloadReason: TypeAlias = Literal["busy", "adapter_loading"]

MAX_LINE_CHARS = 4000


class LoraserveError(Exception):
    """Base of all typed errors.

    An argument is a line of the message, which is printable whatever a file or a caller has put into it.
    """

    def __str__(self) -> str:
        return "\n".join(printable(str(line), MAX_LINE_CHARS) for line in self.args)


class InvalidRequestError(LoraserveError, ValueError):
    """The request itself is wrong: prompt, sampling parameters, adapter name or weights."""


class PromptTooLongError(InvalidRequestError):
    """A prompt has more tokens than the context, or a limit on prompts, has room for."""


class AdapterNotFoundError(LoraserveError, LookupError):
    """No adapter is registered under this name."""


class AdapterFormatError(LoraserveError, ValueError):
    """An adapter's files are malformed, unsupported, or do not fit the base model."""


class AdapterUnavailableError(LoraserveError):
    """A registered adapter can't be used now: its files are gone or changed, or it is being unloaded."""


class SourceUnavailableError(AdapterUnavailableError):
    """Where an adapter comes from does not answer; the same request may succeed later.

    Args:
        message: which source, and what it said.
        retry_after_s: when to come back, in seconds.
    """

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class GenerationConflictError(LoraserveError):
    """An adapter is at another generation than was expected: somebody else has changed it.

    Args:
        message: what is there and what was expected.
        generation: the current one, 0 where there is none.
    """

    def __init__(self, message: str, *, generation: int = 0) -> None:
        super().__init__(message)
        self.generation = generation


class CapacityError(LoraserveError):
    """The memory is too small for this; the message says how much is needed."""


class ModelError(LoraserveError, ValueError):
    """The base model can't be loaded: missing path, unsupported architecture, missing or misshapen tensor."""


class DeviceError(LoraserveError):
    """The GPU can't be used or failed; the message says what is missing and what to do."""


class EngineStoppedError(LoraserveError):
    """The engine is shutting down or has failed and takes no new requests."""


class ReplicaLostError(LoraserveError):
    """The replica that answered is gone, or none is there; the same request may succeed at once.

    Args:
        message: which one, and how far the answer was.
        retry_after_s: when to come back, in seconds.
    """

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OverloadedError(LoraserveError):
    """Too much is waiting already; the same request may be accepted later.

    Args:
        message: what is full, and its limit.
        retry_after_s: about when there will be room, in seconds.
        reason: "busy", or "adapter_loading" if what waits, waits for adapters to be loaded.
    """

    def __init__(self, message: str, *, retry_after_s: float = 1.0, reason: OverloadReason = "busy") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason: OverloadReason = reason


class DeadlineError(LoraserveError):
    """The request was not finished by its deadline; its memory is free again."""


class NotFiniteError(LoraserveError):
    """The model's output for this request is no finite number: weights or their products overflow."""


class StateError(LoraserveError):
    """The directory that keeps adapters, or batches, for the next start can't be used."""


class BatchFileError(LoraserveError):
    """A file of a batch can't be read or written, or is not what it should be."""


class NotStoredError(LoraserveError, LookupError):
    """The caller keeps no such file, batch or response on this server."""


class UnauthenticatedError(LoraserveError):
    """The caller gave no key, or one that is not known."""


class PermissionDeniedError(LoraserveError):
    """The caller's key does not allow this."""
