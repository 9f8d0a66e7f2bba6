"""Everything `loraserve serve` can be told: a field is a flag, a variable LORASERVE_NAME and a YAML key."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from loraserve.adapters.registry import check_adapter_name, check_base_names
from loraserve.adapters.source import AdapterSource, parse_source
from loraserve.adapters.startup import OnAdapterError
from loraserve.config import MAX_COUNTS, EngineConfig
from loraserve.errors import LoraserveError
from loraserve.sampling_params import MAX_LOGPROBS, MAX_N, MAX_STOP_STRINGS
from loraserve.server.keys import ApiKey, PrefixCacheScope

OFF = "off"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.\-]*://[^\s/?#@,]+")
MAX_PORT = 2**16 - 1
MAX_COUNT = 2**31 - 1
MAX_SECONDS = 366 * 24 * 3600.0


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
    most: int | None = None,
) -> Any:
    """A field with its line in `--help`; `flags` and `env` are further names, `most` is the limit."""
    extra: dict[str, Any] = {"group": group, "metavar": metavar, "flags": list(flags), "env": list(env)}
    return Field(default=default, description=text, json_schema_extra=extra, le=most)


def _split(value: Any) -> Any:
    """Variables and flags write several values with commas between them."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    """vLLM's flag takes a list in JSON."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not any(str(text).lstrip().startswith("[") for text in texts):
        return value
    return [origin for text in texts for origin in json.loads(text)]


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


def _yes_or_no(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"give yes or no, not {value!r}")
    return value


Texts: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_split)]
Origins: TypeAlias = Annotated[
    tuple[str, ...], BeforeValidator(_split), BeforeValidator(_listed), AfterValidator(_checked_origins)
]
Port: TypeAlias = Annotated[int, Field(ge=0, le=MAX_PORT), BeforeValidator(_integer)]
OptionalPort: TypeAlias = Annotated[Port | None, BeforeValidator(_none_if_off)]
Count: TypeAlias = Annotated[int, Field(ge=1), BeforeValidator(_integer), AfterValidator(_bounded)]
Memory: TypeAlias = Annotated[str | int, BeforeValidator(_integer)]
YesNo: TypeAlias = Annotated[bool, BeforeValidator(_yes_or_no)]
Seconds: TypeAlias = Annotated[float, Field(ge=0, le=MAX_SECONDS), BeforeValidator(_number)]
PositiveSeconds: TypeAlias = Annotated[float, Field(gt=0, le=MAX_SECONDS), BeforeValidator(_number)]
PerMinute: TypeAlias = Annotated[float, Field(gt=0, le=MAX_COUNT), BeforeValidator(_number)]


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
    pin: YesNo = False
    warm: YesNo = False
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
    base_model: YesNo = True
    requests_per_minute: PerMinute | None = None
    max_concurrent: Count | None = None
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

    model: str = option(
        ..., "model", "what to serve", "MODEL", flags=("--model-id", "--model"), env=("MODEL_ID",)
    )
    revision: str | None = option(
        None,
        "model",
        "branch, tag or commit of a model on the Hub",
        "REV",
        env=("REVISION",),
    )
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

    on_adapter_error: OnAdapterError = option(
        EngineConfig.on_adapter_error,
        "model",
        "what adapters that can't be served do to the start: fail names them all, skip serves the others",
    )
    state_dir: Path | None = option(
        None,
        "model",
        "keep adapters that are loaded, replaced, unloaded or pinned at run time here for the next start; "
        "those that a flag, variable or file names are always loaded as that says",
        "DIRECTORY",
    )

    device: Literal["auto", "cpu", "cuda"] = option(
        EngineConfig.device, "engine", "where to compute; auto takes an NVIDIA GPU if torch sees one"
    )
    dtype: Literal["auto", "bfloat16", "half", "float16", "float", "float32"] = option(
        EngineConfig.dtype,
        "engine",
        "storage of weights, KV cache and adapters; half is float16, float is float32, auto is bfloat16",
        env=("DTYPE",),
    )
    memory: Memory = option(
        EngineConfig.memory,
        "engine",
        "memory that KV cache and adapters share, as 512MiB or 4GiB; auto takes most of what is free",
        "SIZE",
        flags=("--kv-cache-memory-bytes",),
    )
    max_lora_rank: Count = option(
        EngineConfig.max_lora_rank,
        "engine",
        "refuse adapters of a higher rank",
        "R",
        most=MAX_COUNTS["max_lora_rank"],
    )
    max_num_seqs: Count = option(
        EngineConfig.max_num_seqs,
        "engine",
        "most sequences in one step",
        "N",
        most=MAX_COUNTS["max_num_seqs"],
        flags=("--max-batch-size",),
        env=("MAX_BATCH_SIZE",),
    )
    max_batched_tokens: Count = option(
        EngineConfig.max_batched_tokens,
        "engine",
        "most tokens in one step, longer prompts are prefilled in chunks",
        "TOKENS",
        flags=("--max-num-batched-tokens", "--max-batch-prefill-tokens"),
        most=MAX_COUNTS["max_batched_tokens"],
        env=("MAX_BATCH_PREFILL_TOKENS",),
    )
    max_model_len: Count | None = option(
        None,
        "engine",
        "most tokens of prompt and answer together (default: the model's limit, if memory holds it)",
        "TOKENS",
        flags=("--max-total-tokens",),
        env=("MAX_TOTAL_TOKENS",),
    )
    generation_config: str = option(
        EngineConfig.generation_config,
        "engine",
        "defaults of sampling: auto takes the model's generation_config.json, else none or a directory",
        "FROM",
    )
    prefix_caching: YesNo = option(
        EngineConfig.prefix_caching,
        "engine",
        "keep the KV cache of prompts for later ones that begin alike",
        flags=("--enable-prefix-caching",),
        env=("PREFIX_CACHING",),
    )
    threads: Count | None = option(
        None,
        "engine",
        "CPU threads to compute with (default: all cores)",
        "N",
        most=MAX_COUNTS["num_threads"],
    )
    max_waiting: Count = option(
        EngineConfig.max_waiting, "engine", "sequences that may wait for their turn; more are refused", "N"
    )

    host: str = option("127.0.0.1", "server", "address to listen on", "ADDRESS", flags=("--hostname",))
    http_port: OptionalPort = option(
        8000,
        "server",
        "TCP port of the HTTP API, 0 takes a free one, off serves none",
        "PORT",
        flags=("--port", "-p"),
        env=("PORT",),
    )
    grpc_port: OptionalPort = option(
        50051, "server", "TCP port of the gRPC API, 0 takes a free one, off serves none", "PORT"
    )
    drain_seconds: Seconds = option(
        30.0,
        "server",
        "time that running requests get to finish on a stop signal",
        "S",
        flags=("--graceful-termination-timeout",),
        env=("GRACEFUL_TERMINATION_TIMEOUT",),
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
    cors_origin: Origins = option(
        (),
        "server",
        "origin whose web pages may call the HTTP API, as https://app.example, or *; repeat for more",
        "ORIGIN",
        flags=("--cors-allow-origin", "--allowed-origins"),
        env=("CORS_ALLOW_ORIGIN",),
    )
    max_body_size: Count = option(
        16 * 2**20,
        "server",
        "most bytes of an HTTP request's body, or of a gRPC message",
        "BYTES",
        most=2**30,
        flags=("--payload-limit",),
        env=("PAYLOAD_LIMIT",),
    )

    max_concurrent_requests: Count | None = option(
        None,
        "limits",
        "requests that may run at once, of all callers together (default: no limit)",
        "N",
        env=("MAX_CONCURRENT_REQUESTS",),
    )
    max_best_of: Count = option(
        8,
        "limits",
        "most answers that best_of may compare",
        "N",
        most=MAX_N,
        env=("MAX_BEST_OF",),
    )
    max_stop_sequences: Count = option(
        16,
        "limits",
        "most stop strings of a request",
        "N",
        most=MAX_STOP_STRINGS,
        env=("MAX_STOP_SEQUENCES",),
    )
    max_top_n_tokens: Count = option(
        20,
        "limits",
        "most alternatives shown per token",
        "N",
        most=MAX_LOGPROBS,
        env=("MAX_TOP_N_TOKENS",),
    )
    max_client_batch_size: Count = option(
        128,
        "limits",
        "most prompts in one request",
        "N",
        most=2**16,
        env=("MAX_CLIENT_BATCH_SIZE",),
    )
    max_input_tokens: Count | None = option(
        None,
        "limits",
        "most tokens of a prompt (default: the context length less one)",
        "TOKENS",
        flags=("--max-input-length",),
        env=("MAX_INPUT_TOKENS", "MAX_INPUT_LENGTH"),
    )
    trust_request_chat_template: bool = option(
        False, "limits", "let a request bring a chat template of its own, a program that runs here"
    )

    api_key: SecretStr | None = option(
        None,
        "keys",
        "one key that may use every adapter; others read your flags, so prefer the variable",
        "KEY",
        env=("API_KEY", "VLLM_API_KEY"),
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
    hub_repo: Texts | None = option(
        None,
        "keys",
        "pattern of Hub repositories that may be loaded at run time; repeat for more "
        "(default: none where keys are configured, else all)",
        "PATTERN",
    )
    prefix_cache_scope: PrefixCacheScope | None = option(
        None,
        "keys",
        "who finds a prompt cached: shared is everybody, key is requests of the same key only (default: key "
        "where keys are configured, else shared)",
    )
    open_metrics: YesNo = option(False, "keys", "let everybody read /metrics, also where keys are configured")

    tls_certificate: Path | None = option(
        None,
        "tls",
        "certificate and its chain, in PEM, for both APIs",
        "FILE",
        flags=("--ssl-certfile",),
    )
    tls_key: Path | None = option(
        None,
        "tls",
        "private key of the certificate, in PEM",
        "FILE",
        flags=("--ssl-keyfile",),
    )
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
        None,
        "observation",
        "send traces to this OpenTelemetry collector (needs loraserve[tracing])",
        "URL",
        env=("OTLP_ENDPOINT",),
    )
    otlp_service_name: str = option(
        "loraserve",
        "observation",
        "what traces call this server",
        "NAME",
        env=("OTLP_SERVICE_NAME",),
    )

    @model_validator(mode="after")
    def _check_together(self) -> ServeSettings:
        check_base_names(self.served_names)
        for name in self.adapters:
            check_adapter_name(name, self.served_names)
        if self.http_port is None and self.grpc_port is None:
            raise ValueError("http_port and grpc_port are both off, serve at least one API")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("give both tls_certificate and tls_key, or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        return self

    @property
    def served_names(self) -> tuple[str, ...]:
        return self.served_model_name or (self.model,)


def checked_secret(name: str, secret: str) -> str:
    """`secret`, which a header can carry. Raises ConfigError, which does not tell it."""
    if not secret or not secret.isascii() or not secret.isprintable() or " " in secret:
        raise ConfigError(f"key {name!r}: the secret must be one or more visible ASCII characters")
    return secret
