"""JSON text that a request brings, and nothing beyond JSON."""

import json
from typing import Any, NoReturn

from loraserve.errors import InvalidRequestError


def parse_json(what: str, text: str) -> Any:
    """The value. Raises InvalidRequestError: it is no JSON (NaN is none), or nested too deep."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{what}: not JSON: {error}") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
