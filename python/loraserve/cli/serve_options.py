"""The flags of `loraserve serve`, made from its settings, and those that only other launchers have."""

from __future__ import annotations

import argparse
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from loraserve.adapters.source import parse_lora_adapters
from loraserve.errors import InvalidRequestError
from loraserve.settings.environment import CONFIG_VARIABLE, variable_names
from loraserve.settings.errors import ConfigError
from loraserve.settings.fields import OFF
from loraserve.settings.foreign import (
    FALSE,
    FOREIGN_SETTINGS,
    SGLANG_AND_LLAMA_CPP,
    TGI_AND_LORAX,
    TRUE,
    VLLM,
    ForeignSetting,
    adapter_values,
)
from loraserve.settings.schema import ServeSettings

GROUPS = {
    "model": "model and adapters",
    "engine": "engine",
    "server": "server",
    "limits": "limits",
    "batches": "batches",
    "keys": "keys and administration",
    "replicas": "several engines, for `loraserve deploy`",
    "sources": "where adapters come from at run time",
    "tls": "TLS",
    "observation": "logs, metrics and traces",
}
REPEATED = ("adapter_root", "hub_repo", "adapter_url", "adapter_source_name", "cors_origin")
SEVERAL = ("served_model_name",)  # values of one flag, as vLLM takes them


FOREIGN_GROUPS = {
    "TGI's and LoRAX' launchers (a flag's variable has its name in capitals)": TGI_AND_LORAX,
    "vLLM's server": VLLM,
    "SGLang's and llama.cpp's servers": SGLANG_AND_LLAMA_CPP,
}


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, and the flags of `ServeSettings` and of other launchers; `given_flags` reads what was given."""
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
    for title, settings in FOREIGN_GROUPS.items():
        foreign = parser.add_argument_group(title)
        for setting in settings:
            if setting.is_flag:
                _add_foreign(foreign, setting)


@dataclass(frozen=True)
class GivenFlags:
    """Field name → value of every flag that was given, and notes on flags without effect."""

    values: dict[str, Any]
    notes: list[str]


def given_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> GivenFlags:
    """Exits with a usage error if two contradict, or one asks for what this server does not do."""
    try:
        foreign, notes = _foreign_values(args)
    except ConfigError as error:
        parser.error(str(error))
    values = {name: getattr(args, name, None) for name in ServeSettings.model_fields}
    values = foreign | {name: value for name, value in values.items() if value is not None}
    values["adapters"] = _adapters(args, foreign.get("adapters", {}), parser)
    if args.model in (*TRUE, *FALSE):
        parser.error(f"MODEL is {args.model!r}: switches take no value, write --flag or --no-flag")
    if args.model_flag is not None:
        if args.model is not None:
            parser.error(f"MODEL is {args.model!r} and --model-id is {args.model_flag!r}, give one of them")
        values["model"] = args.model_flag
    return GivenFlags({name: value for name, value in values.items() if value is not None}, notes)


def _add_foreign(group: argparse._ArgumentGroup, setting: ForeignSetting) -> None:
    options: dict[str, Any] = {"dest": _dest(setting), "default": None}
    if setting.metavar == "":
        options["action"] = argparse.BooleanOptionalAction
    else:
        options |= {"action": "append", "metavar": setting.metavar}
        options |= {"action": "extend", "nargs": "+"} if setting.is_list else {}
    group.add_argument(setting.flag, *setting.short, help=setting.text.replace("%", "%%"), **options)


def _dest(setting: ForeignSetting) -> str:
    return f"foreign_{setting.name}"


def _foreign_values(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """(settings that other launchers' flags stand for, notes); adapters of several flags together."""
    values: dict[str, Any] = {}
    notes: list[str] = []
    for setting in FOREIGN_SETTINGS:
        given = getattr(args, _dest(setting), None)
        texts = given if isinstance(given, list) else [] if given is None else [str(given).lower()]
        for text in texts:
            meant, note = setting.read(text, setting.flag)
            notes += [] if note is None else [note]
            twice = values.get("adapters", {}).keys() & meant.get("adapters", {}).keys()
            if twice:
                raise ConfigError(f"{setting.flag} names {min(twice)!r} twice")
            adapters = values.get("adapters", {}) | meant.get("adapters", {})
            values |= {**meant, **({"adapters": adapters} if adapters else {})}
    return values, notes


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
        if name in SEVERAL:
            options |= {"action": "extend", "nargs": "+"}
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


def _adapters(
    args: argparse.Namespace, foreign: Mapping[str, Any], parser: argparse.ArgumentParser
) -> dict[str, Any] | None:
    adapters = dict(foreign)
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
