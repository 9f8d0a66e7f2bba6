"""What settings list many of: adapters to serve, and API keys with what each allows."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, SecretStr, model_validator

from loraserve.adapters.source import AdapterSource, parse_source
from loraserve.remote.location import is_remote
from loraserve.settings.errors import ConfigError
from loraserve.settings.fields import Count, PerMinute, SettingsModel, Texts, Weight, YesNo, off_for_no

PrefixCacheScope: TypeAlias = Literal["shared", "key"]
FairBy: TypeAlias = Annotated[Literal["key", "adapter", "key+adapter", "off"], BeforeValidator(off_for_no)]


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """One key and what it allows.

    Args:
        name: what logs and errors call it.
        secret: what clients send as `Authorization: Bearer SECRET`.
        adapters: patterns with `*` and `?`; a name that matches any of them may be used.
        base_model: whether the base model alone may be used too.
        requests_per_minute: None has no limit.
        tokens_per_minute: of prompts and answers; None has no limit.
        weight: of its share of the engine beside other keys.
        max_concurrent: requests that may run at once; None has no limit.
        is_admin: may load, unload and pin adapters, read metrics, and use every adapter.
    """

    name: str
    secret: str = field(repr=False)
    adapters: tuple[str, ...] = ("*",)
    base_model: bool = True
    requests_per_minute: float | None = None
    max_concurrent: int | None = None
    tokens_per_minute: float | None = None
    weight: float = 1.0
    is_admin: bool = False


class AdapterSettings(SettingsModel):
    """One adapter: its source, what is done with it at start, and values that override its loraserve.json.

    Args:
        path: a PEFT directory.
        repo: or else a Hub repository.
        revision: branch, tag or commit of `repo`.
        url: or else a directory, archive or artifact of s3://, gs://, az://, https:// or oci://.
        source: "HF" or "local", only for files written for other servers.
        pin: keep it in the memory pool.
        warm: load it into the pool at start.
        weight: of its share of the engine beside other adapters.
        manifest: fields of loraserve.json.
    """

    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    url: str | None = Field(None, repr=False)
    source: Literal["HF", "hub", "local"] | None = None
    pin: YesNo = False
    warm: YesNo = False
    weight: Weight = 1.0
    manifest: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """`name: path-or-repo` is short for the usual case."""
        if not isinstance(value, str):
            return value
        if is_remote(value):
            return {"url": value}
        location, _, revision = value.partition("@")
        source = parse_source(location, revision or None)
        where = "path" if source.kind == "local" else "repo"
        return {where: source.location, "revision": source.revision}

    @model_validator(mode="after")
    def _check(self) -> AdapterSettings:
        if sum(one is not None for one in (self.path, self.repo, self.url)) != 1:
            raise ValueError("give exactly one of path, repo and url")
        if self.url is not None:
            parse_source(self.url, self.revision)
        if self.path is not None and (self.revision is not None or self.source in ("HF", "hub")):
            raise ValueError("a path has neither a revision nor the source HF, give repo instead")
        if self.repo is not None and self.source == "local":
            raise ValueError("source is local and repo is given, give path instead")
        return self

    def adapter_source(self) -> AdapterSource:
        """`path`, `url`, or `repo` at its `revision`."""
        if self.url is not None:
            return AdapterSource("remote", self.url)
        if self.path is not None:
            return AdapterSource("local", self.path)
        assert self.repo is not None, "one of the three is given"
        return AdapterSource("hub", self.repo, self.revision)


class KeySettings(SettingsModel):
    """One API key; its secret is given here, in a variable or in a file."""

    name: Annotated[str, Field(min_length=1)]
    secret: SecretStr | None = None
    secret_env: str | None = None
    secret_file: Path | None = None
    adapters: Texts = ("*",)
    base_model: YesNo = True
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None
    max_concurrent: Count | None = None
    weight: Weight = 1.0
    admin: YesNo = False

    @model_validator(mode="after")
    def _check(self) -> KeySettings:
        if sum(value is not None for value in (self.secret, self.secret_env, self.secret_file)) != 1:
            raise ValueError("give exactly one of secret, secret_env and secret_file")
        return self

    def api_key(self) -> ApiKey:
        """Raises ConfigError: the variable is not set, the file can't be read, or the secret is empty."""
        return ApiKey(
            name=self.name,
            secret=checked_secret(self.name, self._read_secret()),
            adapters=self.adapters,
            base_model=self.base_model,
            requests_per_minute=self.requests_per_minute,
            max_concurrent=self.max_concurrent,
            tokens_per_minute=self.tokens_per_minute,
            weight=self.weight,
            is_admin=self.admin,
        )

    def _read_secret(self) -> str:
        if self.secret is not None:
            return self.secret.get_secret_value()
        if self.secret_env is not None:
            if self.secret_env not in os.environ:
                raise ConfigError(f"key {self.name!r}: the variable {self.secret_env} is not set")
            return os.environ[self.secret_env]
        assert self.secret_file is not None, "one of the three is given"
        try:
            return self.secret_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"key {self.name!r}: {self.secret_file} can't be read: {error}") from None


def checked_secret(name: str, secret: str) -> str:
    """`secret`, which a header can carry. Raises ConfigError, which does not tell it."""
    if not secret or not secret.isascii() or not secret.isprintable() or " " in secret:
        raise ConfigError(f"key {name!r}: the secret must be one or more visible ASCII characters")
    return secret
