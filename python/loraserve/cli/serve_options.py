"""The flags of `loraserve serve`, made from its settings, and those that only TGI's launcher has."""

from __future__ import annotations

import argparse
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from loraserve.adapters.source import parse_lora_adapters
from loraserve.config_layers import CONFIG_VARIABLE, adapter_values, variable_names
from loraserve.errors import InvalidRequestError
from loraserve.serve_config import OFF, ServeSettings

GROUPS = {
    "model": "model and adapters",
    "engine": "engine",
    "server": "server",
    "limits": "limits",
    "keys": "keys and administration",
    "tls": "TLS",
    "observation": "logs, metrics and traces",
}
REPEATED = ("adapter_root", "hub_repo")


@dataclass(frozen=True)
class ForeignFlag:
    """A flag of TGI's launcher: `accepted` are its only values here; None takes any, without effect."""

    name: str
    metavar: str
    accepted: tuple[str, ...] | None
    text: str


FOREIGN_FLAGS = (
    ForeignFlag("--num-shard", "N", ("1",), "only 1: a model runs on one device"),
    ForeignFlag("--quantize", "METHOD", (), "refused: the dtype of --dtype is what computes"),
    ForeignFlag("--waiting-served-ratio", "X", None, "no effect: waiting requests join at every step"),
    ForeignFlag("--max-batch-total-tokens", "TOKENS", None, "no effect: --memory bounds the batch"),
)


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=_help("model"))
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    groups["model"].add_argument(
        "--config", metavar="FILE", help=f"YAML file of these settings (variable {CONFIG_VARIABLE})"
    )
    groups["model"].add_argument(
        "--lora-adapters",
        metavar="LIST",
        help="adapters as TGI lists them: id, name=path, id@revision, name=path@revision, commas between",
    )
    for name, field in ServeSettings.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict):
            _add(groups[str(extra["group"])], name, field, extra)
    foreign = parser.add_argument_group("TGI's launcher")
    for flag in FOREIGN_FLAGS:
        foreign.add_argument(flag.name, metavar=flag.metavar, help=flag.text)


def given_values(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Field name → value of every flag that was given; exits with a usage error if two contradict."""
    for flag in FOREIGN_FLAGS:
        value = getattr(args, flag.name[2:].replace("-", "_"))
        if value is not None and flag.accepted is not None and value not in flag.accepted:
            parser.error(f"{flag.name} is {value!r}, {flag.text}")
    values = {name: getattr(args, name, None) for name in ServeSettings.model_fields}
    values["adapters"] = _adapters(args, parser)
    if args.model_flag is not None:
        if args.model is not None:
            parser.error(f"MODEL is {args.model!r} and --model-id is {args.model_flag!r}, give one of them")
        values["model"] = args.model_flag
    return {name: value for name, value in values.items() if value is not None}


def _add(group: argparse._ArgumentGroup, name: str, field: FieldInfo, extra: Mapping[str, Any]) -> None:
    others = [str(flag) for flag in extra["flags"]]
    if name == "model":
        group.add_argument(*others, dest="model_flag", metavar="MODEL", help="the same as MODEL")
        return
    if name == "adapters":
        group.add_argument(
            "--adapter",
            action="append",
            default=[],
            type=_name_and_source,
            metavar="NAME=SOURCE",
            help=_help(name),
        )
        return
    flags = [f"--{name.replace('_', '-')}", *others]
    kinds = _kinds(field.annotation)
    options: dict[str, Any] = {"dest": name, "default": None, "help": _help(name)}
    if bool in kinds:
        options["action"] = argparse.BooleanOptionalAction
    else:
        choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), None)
        options |= {"choices": choices, "type": _reader(kinds), "metavar": extra["metavar"] or None}
        if name in REPEATED:
            options["action"] = "append"
    group.add_argument(*flags, **options)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; of another type, itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for member in get_args(annotation) for kind in _kinds(member))
    if get_origin(annotation) is not None and hasattr(annotation, "__metadata__"):
        return _kinds(get_args(annotation)[0])
    return (annotation,)


def _reader(kinds: Sequence[Any]) -> Any:
    """How argparse reads a value, so that what is no number is wrong usage."""
    if str in kinds:
        return str
    if int in kinds:
        return _integer_or_off
    return float if float in kinds else str


def _integer_or_off(text: str) -> int | str:
    return text if text == OFF else int(text)


_integer_or_off.__name__ = "int"  # argparse names the function in its message


def _help(name: str) -> str:
    field = ServeSettings.model_fields[name]
    default = field.default
    text = (field.description or "").replace("%", "%%")
    if default not in (None, PydanticUndefined, ..., ()) and default != {} and not isinstance(default, bool):
        shown = ", ".join(default) if isinstance(default, tuple) else default
        text += f" (default {shown:g})" if isinstance(shown, float) else f" (default {shown})"
    elif isinstance(default, bool):
        text += f" (default {'yes' if default else 'no'})"
    return f"{text} [{', '.join(variable_names(name))}]"


def _adapters(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any] | None:
    adapters: dict[str, Any] = {}
    try:
        listed = adapter_values(parse_lora_adapters(args.lora_adapters or ""))
    except InvalidRequestError as error:
        parser.error(f"--lora-adapters: {error}")
    for name, value in (*args.adapter, *listed.items()):
        if name in adapters:
            parser.error(f"--adapter names {name!r} twice")
        adapters[name] = value
    return adapters or None


def _name_and_source(text: str) -> tuple[str, str]:
    name, separator, source = text.partition("=")
    if not (name and separator and source):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, source
