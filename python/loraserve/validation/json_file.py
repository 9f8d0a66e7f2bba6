"""Reads the small JSON files of a model directory."""

import json
from pathlib import Path
from typing import Any

from loraserve import _core
from loraserve.errors import ModelError
from loraserve.validation.files import read_regular_file

MAX_NBYTES = 2**28  # indexes of shards and vocabularies have megabytes
MAX_VALUES = 2**20  # each takes some hundred bytes of memory


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object. Raises ModelError if the file is missing, malformed or not an object."""
    try:
        data = read_regular_file(path, MAX_NBYTES)
        num_values = sum(_core.count_json(data)[:2])
        if num_values > MAX_VALUES:
            raise ModelError(f"{path} has more than {num_values} values, the limit is {MAX_VALUES}")
        value = json.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except ModelError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        foreign = _core.recognise_file(str(path), is_json=True)
        if foreign is not None:
            raise ModelError(f"{path} is {foreign}") from None
        raise ModelError(f"{path} can't be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """Like `read_json`, an absent file being an empty object."""
    return read_json(path) if path.exists() else {}
