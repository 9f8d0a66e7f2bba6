"""The types of settings, and `option`, which declares one: its default, its help, and its further names."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from loraserve.config import parse_memory, parse_quantization
from loraserve.errors import InvalidRequestError

OFF = "off"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.\-]*://[^\s/?#@,]+")
MAX_PORT = 2**16 - 1
MAX_COUNT = 2**31 - 1
MAX_SECONDS = 366 * 24 * 3600.0


def option(
    default: Any,
    group: str,
    text: str,
    metavar: str = "",
    *,
    flags: Sequence[str] = (),
    env: Sequence[str] = (),
    most: int | None = None,
) -> Any:
    """A field with its line in `--help`; `flags` and `env` are further names, `most` is the limit."""
    extra: dict[str, Any] = {"group": group, "metavar": metavar, "flags": list(flags), "env": list(env)}
    return Field(default=default, description=text, json_schema_extra=extra, le=most)


def _split(value: Any) -> Any:
    """Variables and flags write several values with commas between them; flags may have several."""
    if isinstance(value, str):
        return _parts(value)
    if not isinstance(value, list | tuple):
        return value
    return [part for one in value for part in (_parts(one) if isinstance(one, str) and "," in one else [one])]


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _listed(value: Any) -> Any:
    """vLLM's flag takes a list in JSON."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return value
    if not any(text.lstrip().startswith("[") for text in texts):
        return value
    try:
        return [origin for text in texts for origin in json.loads(text)]
    except (TypeError, RecursionError):
        raise ValueError("give a list of texts in JSON") from None


def _checked_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """What a browser sends as Origin: scheme, host and port, nothing behind."""
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ValueError(
                f"{origin!r:.100} is no origin, write it as https://app.example or http://host:3000"
            )
    return origins


def _none_if_off(value: Any) -> Any:
    return None if value == OFF or value is False else value


def off_for_no(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return OFF if value is False else value


def _number(value: Any) -> Any:
    """YAML reads `yes` and `on` as true, which Python takes for 1."""
    if isinstance(value, bool):
        raise ValueError(f"give a number, not {'yes' if value else 'no'}")
    return value


def _integer(value: Any) -> Any:
    if isinstance(value, float):
        raise ValueError(f"give an integer, not {value!r}")
    return _number(value)


def _bounded(value: int) -> int:
    """Of an integer whose setting has no smaller limit of its own."""
    if value > MAX_COUNT:
        raise ValueError(f"input should be less than or equal to {MAX_COUNT}, got {value}")
    return value


def _quantization(value: str | None) -> str | None:
    try:
        return None if value is None else parse_quantization(value)
    except InvalidRequestError as error:
        raise ValueError(str(error)) from None


def _size(value: Any) -> int:
    """Bytes, as engine's settings of memory are written."""
    try:
        nbytes = parse_memory(_integer(value), "size", least=0)
    except InvalidRequestError as error:
        raise ValueError(str(error)) from None
    if nbytes is None:
        raise ValueError("give a size, as 64MiB, or 0 for none")
    return nbytes


def _yes_or_no(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"give yes or no, not {value!r}")
    return value


Speculate: TypeAlias = Annotated[Literal["off", "ngram"], BeforeValidator(off_for_no)]
Texts: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_split)]
Origins: TypeAlias = Annotated[
    tuple[str, ...], BeforeValidator(_split), BeforeValidator(_listed), AfterValidator(_checked_origins)
]
Port: TypeAlias = Annotated[int, Field(ge=0, le=MAX_PORT), BeforeValidator(_integer)]
OptionalPort: TypeAlias = Annotated[Port | None, BeforeValidator(_none_if_off)]
Count: TypeAlias = Annotated[int, Field(ge=1), BeforeValidator(_integer), AfterValidator(_bounded)]
Memory: TypeAlias = Annotated[str | int, BeforeValidator(_integer)]
Size: TypeAlias = Annotated[int, BeforeValidator(_size)]
Quantization: TypeAlias = Annotated[str | None, AfterValidator(_quantization)]
YesNo: TypeAlias = Annotated[bool, BeforeValidator(_yes_or_no)]
Share: TypeAlias = Annotated[float, Field(ge=0.01, le=1), BeforeValidator(_number)]
Seconds: TypeAlias = Annotated[float, Field(ge=0, le=MAX_SECONDS), BeforeValidator(_number)]
PositiveSeconds: TypeAlias = Annotated[float, Field(gt=0, le=MAX_SECONDS), BeforeValidator(_number)]
WEIGHTS: Final = (0.05, 20.0)  # least and most of a share
Weight: TypeAlias = Annotated[float, Field(ge=WEIGHTS[0], le=WEIGHTS[1]), BeforeValidator(_number)]
PerMinute: TypeAlias = Annotated[float, Field(gt=0, le=MAX_COUNT), BeforeValidator(_number)]


class SettingsModel(BaseModel):
    """Settings that belong together; an unknown name is an error, and no value is shown in one."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
