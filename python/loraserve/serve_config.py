"""Everything `loraserve serve` can be told: a field is a flag, a variable LORASERVE_NAME and a YAML key."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from loraserve.adapters.registry import check_adapter_name
from loraserve.adapters.source import AdapterSource, parse_source
from loraserve.config import EngineConfig
from loraserve.errors import LoraserveError
from loraserve.server.keys import ApiKey

OFF = "off"
MAX_PORT = 2**16 - 1


class ConfigError(LoraserveError, ValueError):
    """A setting of the server is wrong; the message says which, where it was given, and what it may be."""


def option(
    default: Any,
    group: str,
    text: str,
    metavar: str = "",
    *,
    flags: Sequence[str] = (),
    env: Sequence[str] = (),
) -> Any:
    """A field with its line in `--help`; `flags` and `env` are further names of it."""
    extra: dict[str, Any] = {"group": group, "metavar": metavar, "flags": list(flags), "env": list(env)}
    return Field(default=default, description=text, json_schema_extra=extra)


def _split(value: Any) -> Any:
    """Variables and flags write several values with commas between them."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _none_if_off(value: Any) -> Any:
    return None if value == OFF or value is False else value


Texts: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_split)]
Port: TypeAlias = Annotated[int, Field(ge=0, le=MAX_PORT)]
OptionalPort: TypeAlias = Annotated[Port | None, BeforeValidator(_none_if_off)]
Count: TypeAlias = Annotated[int, Field(ge=1)]
Seconds: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveSeconds: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class AdapterSettings(_Model):
    """One adapter: its source, what is done with it at start, and values that override its loraserve.json.

    Args:
        path: a PEFT directory.
        repo: or else a Hub repository.
        revision: branch, tag or commit of `repo`.
        source: "HF" or "local", only for files written for other servers.
        pin: keep it in the memory pool.
        warm: load it into the pool at start.
        manifest: fields of loraserve.json.
    """

    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    source: Literal["HF", "hub", "local"] | None = None
    pin: bool = False
    warm: bool = False
    manifest: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """`name: path-or-repo` is short for the usual case."""
        if not isinstance(value, str):
            return value
        location, _, revision = value.partition("@")
        source = parse_source(location, revision or None)
        where = "path" if source.kind == "local" else "repo"
        return {where: source.location, "revision": source.revision}

    @model_validator(mode="after")
    def _check(self) -> AdapterSettings:
        if (self.path is None) == (self.repo is None):
            raise ValueError("give exactly one of path and repo")
        if self.path is not None and (self.revision is not None or self.source in ("HF", "hub")):
            raise ValueError("a path has neither a revision nor the source HF, give repo instead")
        if self.repo is not None and self.source == "local":
            raise ValueError("source is local and repo is given, give path instead")
        return self

    def adapter_source(self) -> AdapterSource:
        if self.path is not None:
            return AdapterSource("local", self.path)
        assert self.repo is not None, "one of path and repo is given"
        return AdapterSource("hub", self.repo, self.revision)


class KeySettings(_Model):
    """One API key; its secret is given here, in a variable or in a file."""

    name: Annotated[str, Field(min_length=1)]
    secret: SecretStr | None = None
    secret_env: str | None = None
    secret_file: Path | None = None
    adapters: Texts = ("*",)
    base_model: bool = True
    requests_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_concurrent: Count | None = None
    admin: bool = False

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


class ServeSettings(_Model):
    """The settings, checked one by one; what they mean together is checked where they are used."""

    model: str = option(..., "model", "what to serve", "MODEL", flags=("--model-id",), env=("MODEL_ID",))
    revision: str | None = option(None, "model", "branch, tag or commit of a model on the Hub", "REV")
    served_model_name: Texts = option(
        (), "model", "names of the base model in the HTTP API, commas between (default: MODEL)", "NAMES"
    )
    adapters: dict[str, AdapterSettings] = option(
        {},
        "model",
        "serve a PEFT directory or Hub repository as NAME; repeat for more",
        "NAME=SOURCE",
        env=("LORA_ADAPTERS",),
    )

    device: Literal["auto", "cpu", "cuda"] = option(
        EngineConfig.device, "engine", "where to compute; auto takes an NVIDIA GPU if torch sees one"
    )
    dtype: Literal["bfloat16", "float16", "float32"] = option(
        EngineConfig.dtype, "engine", "storage of weights, KV cache and adapters"
    )
    memory: str | int = option(
        EngineConfig.memory, "engine", "memory that KV cache and adapters share, as 512MiB or 4GiB", "SIZE"
    )
    max_lora_rank: int = option(EngineConfig.max_lora_rank, "engine", "refuse adapters of a higher rank", "R")
    max_num_seqs: int = option(EngineConfig.max_num_seqs, "engine", "most sequences in one step", "N")
    max_batched_tokens: int = option(
        EngineConfig.max_batched_tokens,
        "engine",
        "most tokens in one step, longer prompts are prefilled in chunks",
        "TOKENS",
        flags=("--max-batch-prefill-tokens",),
    )
    max_model_len: int | None = option(
        None,
        "engine",
        "most tokens of prompt and answer together (default: the model's limit)",
        "TOKENS",
        flags=("--max-total-tokens",),
    )
    prefix_caching: bool = option(
        EngineConfig.prefix_caching, "engine", "keep the KV cache of prompts for later ones that begin alike"
    )
    threads: int | None = option(None, "engine", "CPU threads to compute with (default: all cores)", "N")
    max_waiting: int = option(
        EngineConfig.max_waiting, "engine", "sequences that may wait for their turn; more are refused", "N"
    )

    host: str = option("127.0.0.1", "server", "address to listen on", "ADDRESS", flags=("--hostname",))
    http_port: OptionalPort = option(
        8000,
        "server",
        "TCP port of the HTTP API, 0 takes a free one, off serves none",
        "PORT",
        flags=("--port",),
    )
    grpc_port: OptionalPort = option(
        50051, "server", "TCP port of the gRPC API, 0 takes a free one, off serves none", "PORT"
    )
    drain_seconds: Seconds = option(
        30.0, "server", "time that running requests get to finish on a stop signal", "S"
    )
    request_timeout_seconds: PositiveSeconds | None = option(
        None, "server", "end every request after this time (default: none)", "S"
    )
    header_timeout_seconds: PositiveSeconds = option(
        10.0, "server", "close HTTP connections that take longer to send their headers", "S"
    )
    body_timeout_seconds: PositiveSeconds = option(
        60.0, "server", "close HTTP connections that take longer to send a body", "S"
    )
    max_body_size: Count = option(16 * 2**20, "server", "most bytes of an HTTP request's body", "BYTES")

    max_concurrent_requests: Count | None = option(
        None, "limits", "requests that may run at once, of all callers together (default: no limit)", "N"
    )
    max_best_of: Count = option(8, "limits", "most answers that best_of may compare", "N")
    max_stop_sequences: Count = option(16, "limits", "most stop strings of a request", "N")
    max_top_n_tokens: Count = option(20, "limits", "most alternatives shown per token", "N")
    max_client_batch_size: Count = option(128, "limits", "most prompts in one request", "N")
    max_input_tokens: Count | None = option(
        None,
        "limits",
        "most tokens of a prompt (default: the context length less one)",
        "TOKENS",
        flags=("--max-input-length",),
    )

    api_key: SecretStr | None = option(
        None,
        "keys",
        "one key that may use every adapter; others read your flags, so prefer the variable",
        "KEY",
    )
    admin_key: SecretStr | None = option(
        None,
        "keys",
        "key that may load and unload adapters; with any key configured, every request needs one",
        "KEY",
    )
    keys_file: Path | None = option(
        None,
        "keys",
        "YAML file of keys: name, secret, adapters, requests_per_minute, max_concurrent, admin",
        "FILE",
    )
    keys: tuple[KeySettings, ...] = Field(default=())
    adapter_root: Texts = option(
        (), "keys", "directory under which adapters may be loaded at run time; repeat for more", "DIRECTORY"
    )
    hub_repo: Texts = option(
        ("*",),
        "keys",
        "pattern of Hub repositories that may be loaded at run time; repeat for more",
        "PATTERN",
    )
    open_metrics: bool = option(False, "keys", "let everybody read /metrics, also where keys are configured")

    tls_certificate: Path | None = option(
        None, "tls", "certificate and its chain, in PEM, for both APIs", "FILE"
    )
    tls_key: Path | None = option(None, "tls", "private key of the certificate, in PEM", "FILE")
    tls_client_ca: Path | None = option(
        None, "tls", "authorities of which every client must show a certificate, in PEM", "FILE"
    )

    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info", "observation", "least level to log"
    )
    log_format: Literal["text", "json"] = option(
        "text", "observation", "json writes one object a line, with the request's fields"
    )
    max_adapter_labels: Count = option(
        100, "observation", "adapters with metrics of their own; others are counted together", "N"
    )
    otlp_endpoint: str | None = option(
        None, "observation", "send traces to this OpenTelemetry collector (needs loraserve[tracing])", "URL"
    )
    otlp_service_name: str = option("loraserve", "observation", "what traces call this server", "NAME")

    @model_validator(mode="after")
    def _check_together(self) -> ServeSettings:
        for name in self.adapters:
            check_adapter_name(name)
        if self.http_port is None and self.grpc_port is None:
            raise ValueError("http_port and grpc_port are both off, serve at least one API")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("give both tls_certificate and tls_key, or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        for name in self.served_model_name:
            if name in self.adapters:
                raise ValueError(f"served_model_name {name!r} is an adapter's name too, choose another")
        return self

    @property
    def served_names(self) -> tuple[str, ...]:
        return self.served_model_name or (self.model,)


def checked_secret(name: str, secret: str) -> str:
    """`secret`, which a header can carry. Raises ConfigError, which does not tell it."""
    if not secret or not secret.isascii() or not secret.isprintable() or " " in secret:
        raise ConfigError(f"key {name!r}: the secret must be one or more visible ASCII characters")
    return secret
