"""A model split over several .gguf files: which they are, and that they belong together.

llama.cpp's gguf-split names them `NAME-00001-of-00003.gguf`; metadata is in the first, tensors are in all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loraserve.errors import ModelError

MAX_PARTS: Final = 99_999  # a name has five digits


def split_paths(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """All parts in order, given the first; a file that is not split is its only one.

    Raises ModelError: it is another part, its name is not a part's, or some are missing.
    """
    number, count = _place(metadata)
    if count == 1:
        return [path]
    where = f"{path} is part {number + 1} of {count}"
    if not 0 <= number < count <= MAX_PARTS:
        raise ModelError(f"{where}, which can't be")
    ending = _ending(number, count)
    if not path.name.endswith(ending):
        raise ModelError(f"{where}: its name must end in {ending}, and all parts lie in one directory")
    stem = path.name.removesuffix(ending)
    parts = [path.with_name(stem + _ending(index, count)) for index in range(count)]
    if number > 0:
        raise ModelError(f"{where}: give the first, {parts[0]}")
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise ModelError(f"{where}: {missing[0]}{more} missing beside it")
    return parts


def check_part(path: Path, metadata: Mapping[str, Any], number: int, first: Mapping[str, Any]) -> None:
    """That the header of part `number`, counted from 0, says so. Raises ModelError."""
    expected = number, _place(first)[1]
    found = _place(metadata)
    if found != expected:
        raise ModelError(
            f"{path} says that it is part {found[0] + 1} of {found[1]}, "
            f"expected {expected[0] + 1} of {expected[1]}"
        )


def check_total(path: Path, metadata: Mapping[str, Any], num_tensors: int) -> None:
    """That all parts together have as many tensors as the first one says. Raises ModelError."""
    expected = metadata.get("split.tensors.count", num_tensors)
    if _place(metadata)[1] > 1 and num_tensors != expected:
        raise ModelError(f"{path}: all parts have {num_tensors} tensors, expected {expected}: get them again")


def _place(metadata: Mapping[str, Any]) -> tuple[int, int]:
    """The part's number, from 0, and how many there are; 0 of 1 where it is not split."""
    count: int = metadata.get("split.count", 0)
    return (metadata.get("split.no", 0), count) if count > 1 else (0, 1)


def _ending(number: int, count: int) -> str:
    return f"-{number + 1:05d}-of-{count:05d}.gguf"
