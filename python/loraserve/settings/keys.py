"""All API keys of a server's settings, and what is closed, unless opened, where there are any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from loraserve.settings.entries import ApiKey, FairBy, KeySettings, PrefixCacheScope, checked_secret
from loraserve.settings.errors import ConfigError, problems
from loraserve.settings.schema import ServeSettings
from loraserve.settings.yaml_file import read_yaml
from loraserve.validation.files import expanded

_KEYS = TypeAdapter(tuple[KeySettings, ...])


def api_keys(settings: ServeSettings) -> list[ApiKey]:
    """Raises ConfigError: a key can't be read, or two have the same name or secret."""
    given = [*settings.keys, *(read_keys_file(settings.keys_file) if settings.keys_file is not None else ())]
    keys = [key.api_key() for key in given]
    for name, secret, is_admin in (
        ("api_key", settings.api_key, False),
        ("admin_key", settings.admin_key, True),
    ):
        if secret is not None:
            text = checked_secret(name, secret.get_secret_value())
            keys.append(ApiKey(name=name, secret=text, is_admin=is_admin))
    _check_distinct(keys)
    return keys


def prefix_cache_scope(settings: ServeSettings, keys: Sequence[ApiKey]) -> PrefixCacheScope:
    """Keys are kept apart unless the settings say otherwise.

    Raises ConfigError: there are none to keep apart.
    """
    if settings.prefix_cache_scope == "key" and not keys:
        raise ConfigError(
            "prefix_cache_scope is key, but no keys are configured to tell callers apart: "
            "configure keys, or leave it out"
        )
    return settings.prefix_cache_scope or ("key" if keys else "shared")


def fair_by(settings: ServeSettings, keys: Sequence[ApiKey]) -> FairBy:
    """Keys have equal shares unless the settings say otherwise, adapters where there are none.

    Raises ConfigError: there are none to tell callers apart.
    """
    if settings.fair_by in ("key", "key+adapter") and not keys:
        raise ConfigError(
            f"fair_by is {settings.fair_by}, but no keys are configured to tell callers apart: "
            "configure keys, or set it to adapter or off"
        )
    return settings.fair_by or ("key" if keys else "adapter")


def hub_repos(settings: ServeSettings, *, has_keys: bool) -> tuple[str, ...]:
    """Patterns of what may be fetched at run time; with keys, none unless the settings say so."""
    if settings.hub_repo is not None:
        return settings.hub_repo
    return () if has_keys else ("*",)


def read_keys_file(path: Path) -> tuple[KeySettings, ...]:
    """The keys of a list, or of a mapping with the one entry `keys`. Raises ConfigError."""
    values = read_yaml(path)
    if isinstance(values, Mapping) and set(values) == {"keys"}:
        values = values["keys"]
    try:
        keys = _KEYS.validate_python(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {problems(error)}") from None
    return tuple(_anchored(key, path.parent) for key in keys)


def _anchored(key: KeySettings, folder: Path) -> KeySettings:
    """A secret file's path is relative to the file that names it."""
    if key.secret_file is None:
        return key
    return key.model_copy(update={"secret_file": folder / expanded(key.secret_file)})


def _check_distinct(keys: Sequence[ApiKey]) -> None:
    by_secret: dict[str, str] = {}
    names: set[str] = set()
    for key in keys:
        if key.name in names:
            raise ConfigError(f"two keys are named {key.name!r}, names are distinct")
        if key.secret in by_secret:
            raise ConfigError(f"keys {by_secret[key.secret]!r} and {key.name!r} have the same secret")
        names.add(key.name)
        by_secret[key.secret] = key.name
