"""What the environment says: this server's variables, those of other launchers, and misspelt ones.

LORASERVE_NAME      a setting of this server             unknown: an error
LORA_ADAPTERS, …    other names of settings              listed with the setting
NUM_SHARD, …        what only other launchers have       `foreign_settings.py`
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from loraserve.adapters.source import parse_lora_adapters
from loraserve.settings.errors import ConfigError
from loraserve.settings.foreign import adapter_values, variable_settings
from loraserve.settings.schema import ServeSettings

PREFIX = "LORASERVE_"
CONFIG_VARIABLE = f"{PREFIX}CONFIG"

# Read elsewhere: by the kernels, benches and tests.
OTHER_VARIABLES = ("LORASERVE_CACHE_DIR", "LORASERVE_CPU_ISA")
DEVELOPMENT_VARIABLES = re.compile(r"LORASERVE_(TEST|BENCH|SCHEMATHESIS)_\w+")

# Kubernetes sets these in every pod beside a service called loraserve, or loraserve-http: NAME_PORT is a URL.
_SERVICE = re.compile(r"LORASERVE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://\S+")


def read_environment(environ: Mapping[str, str]) -> tuple[dict[str, tuple[str, Any]], list[str]]:
    """(field → (variable, value), notes on what has no effect); an empty variable is as none.

    Raises ConfigError: another launcher's variable asks for what this server does not do.
    """
    environ = {name: value for name, value in environ.items() if value and not _is_of_a_service(name, value)}
    found, notes = variable_settings(environ)
    preloaded = found.pop("adapters", None)
    for name, field in ServeSettings.model_fields.items():
        if field.json_schema_extra is None:
            continue
        for variable in variable_names(name):
            if variable in environ:
                found[name] = (variable, environ[variable])
                break
    if "adapters" in found:
        variable, text = found["adapters"]
        found["adapters"] = (variable, adapter_values(parse_lora_adapters(text)))
    if preloaded is not None:
        variable, adapters = found.get("adapters", preloaded)
        found["adapters"] = (variable, adapters | preloaded[1])
    return found, notes


def variable_names(name: str) -> tuple[str, ...]:
    """The environment variables of a setting, the first that is set counts."""
    extra = ServeSettings.model_fields[name].json_schema_extra
    others = extra["env"] if isinstance(extra, dict) else []
    assert isinstance(others, list), "option() makes it a list"
    return (f"{PREFIX}{name.upper()}", *map(str, others))


def check_variables(environ: Mapping[str, str], secrets: Callable[[], Collection[str]] = tuple) -> None:
    """Raises ConfigError: a variable LORASERVE_… means nothing; `secrets()` are those that keys are in."""
    known = _known_variables()
    unknown = [
        name
        for name, value in sorted(environ.items())
        if name.startswith(PREFIX)
        and known.get(name) != name
        and not DEVELOPMENT_VARIABLES.fullmatch(name)
        and not _is_of_a_service(name, value)
    ]
    meaningless = set(unknown) - set(secrets()) if unknown else ()
    if meaningless:
        raise ConfigError("; ".join(_unknown_text(name, known) for name in sorted(meaningless)))


def _known_variables() -> dict[str, str]:
    """Every variable LORASERVE_…, and what a setting's further flags could be taken for → the setting's."""
    known = {name: name for name in (CONFIG_VARIABLE, *OTHER_VARIABLES)}
    for name, field in ServeSettings.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict):
            variable, flags = f"{PREFIX}{name.upper()}", extra["flags"]
            assert isinstance(flags, list), "option() makes it a list"
            likely = [f"{PREFIX}{str(flag).lstrip('-').replace('-', '_').upper()}" for flag in flags]
            known = dict.fromkeys(likely, variable) | known | {variable: variable}
    return known


def _unknown_text(name: str, known: Mapping[str, str]) -> str:
    likely = [known[match] for match in difflib.get_close_matches(name, known, 1)]
    remedy = f"did you mean {likely[0]}?" if likely else "unset it, `loraserve serve --help` lists them"
    return f"the variable {name[:100]!r} is no setting, {remedy}"


def _is_of_a_service(name: str, value: str) -> bool:
    is_url = name.startswith(PREFIX) and name.endswith("_PORT") and _SERVICE_URL.fullmatch(value)
    return bool(is_url or _SERVICE.fullmatch(name))
