"""`BackendCall`: what the `tokenizers` library raises of its own, made one of ours where it is called."""

from __future__ import annotations

from types import TracebackType

from loraserve.errors import LoraserveError


class BackendCall:
    """A block in which what `tokenizers` raises becomes `kind`, its text after `what`.

    It raises Exception itself and no class of it, and panics, which are no Exception; others are left alone.
    """

    def __init__(self, what: str, kind: type[LoraserveError]) -> None:
        self._what = what
        self._kind = kind

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and _is_of_tokenizers(error):
            raise self._kind(f"{self._what}: {error}") from error


def _is_of_tokenizers(error: BaseException) -> bool:
    is_panic = not isinstance(error, Exception | KeyboardInterrupt | SystemExit | GeneratorExit)
    return is_panic or type(error) is Exception
