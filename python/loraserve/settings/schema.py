"""Everything `loraserve serve` can be told: a field is a flag, a variable LORASERVE_NAME and a YAML key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, model_validator

from loraserve.adapters.registry import check_adapter_name, check_base_names
from loraserve.adapters.startup import OnAdapterError
from loraserve.config import MAX_COUNTS, MAX_KEPT_GENERATIONS, EngineConfig, check_merge, parse_memory
from loraserve.sampling_params import MAX_LOGPROBS, MAX_N, MAX_STOP_STRINGS
from loraserve.settings.batches import BatchSettings
from loraserve.settings.entries import AdapterSettings, FairBy, KeySettings, PrefixCacheScope
from loraserve.settings.fields import (
    Count,
    Memory,
    OptionalPort,
    Origins,
    PositiveSeconds,
    Quantization,
    Seconds,
    Share,
    Size,
    Speculate,
    Texts,
    YesNo,
    option,
)
from loraserve.tools.families import check_reasoning_parser, check_tool_parser


class ServeSettings(BatchSettings):
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

    merge: str | None = option(
        None,
        "model",
        "fold this one adapter into the model at load: the model's speed, and no other adapter",
        "NAME",
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
        EngineConfig.device, "engine", "where to compute; auto takes an NVIDIA GPU that can run the kernels"
    )
    dtype: Literal["auto", "bfloat16", "half", "float16", "float", "float32"] = option(
        EngineConfig.dtype,
        "engine",
        "storage of weights, KV cache and adapters; half is float16, float is float32, auto is bfloat16",
        env=("DTYPE",),
    )
    quantization: Quantization = option(
        EngineConfig.quantization,
        "engine",
        "auto, the default, keeps quantised weights of .gguf, AWQ, GPTQ, compressed-tensors as they are on a "
        "CPU; none dequantises them to --dtype; int8 and int4 quantise float weights at load",
        "METHOD",
        flags=("-q",),
    )
    adapter_dtype: Literal["auto", "int8"] = option(
        EngineConfig.adapter_dtype,
        "engine",
        "what adapters are kept in: auto is --dtype; int8 takes a byte a value, so that about twice as many "
        "fit into --memory, for answers that change a little (CPU only)",
    )
    memory: Memory = option(
        EngineConfig.memory,
        "engine",
        "memory that KV cache and adapters share, as 512MiB or 4GiB; auto takes most of what is free",
        "SIZE",
        flags=("--kv-cache-memory-bytes",),
    )
    keep_generations: Annotated[int, Field(ge=0)] = option(
        EngineConfig.keep_generations,
        "engine",
        "earlier versions of each adapter that stay for rollback and for requests that pin one (NAME@NUMBER)",
        "N",
        most=MAX_KEPT_GENERATIONS,
    )
    adapter_host_memory: Memory = option(
        EngineConfig.adapter_host_memory,
        "engine",
        "main memory that keeps adapters for their return to the pool, 0 is off; auto takes half of the rest",
        "SIZE",
    )
    gpu_memory_utilization: Share = option(
        EngineConfig.gpu_memory_utilization,
        "engine",
        "share of a GPU's memory that this process may use, weights and all, where --memory is auto",
        "X",
        flags=("--cuda-memory-fraction",),
        env=("CUDA_MEMORY_FRACTION",),
    )
    cuda_graphs: YesNo = option(
        EngineConfig.cuda_graphs,
        "engine",
        "capture decode steps on a GPU at start: a longer start, shorter steps",
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
    max_batch_adapter_memory: Memory = option(
        EngineConfig.max_batch_adapter_memory,
        "engine",
        "most bytes of different adapters that run at once, requests for others wait; auto sets no limit",
        "SIZE",
    )
    max_batched_tokens: Count = option(
        EngineConfig.max_batched_tokens,
        "engine",
        "most tokens in one step, at least --max-prefill-tokens",
        "TOKENS",
        flags=("--max-num-batched-tokens",),
        most=MAX_COUNTS["max_batched_tokens"],
    )
    max_prefill_tokens: Count | None = option(
        None,
        "engine",
        "most tokens of prompts in one step, longer ones are prefilled in chunks (default: 256 on a CPU, "
        "on a GPU as many as fit)",
        "TOKENS",
        flags=("--max-batch-prefill-tokens", "--chunked-prefill-size"),
        most=MAX_COUNTS["max_prefill_tokens"],
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
    speculate: Speculate = option(
        EngineConfig.speculate,
        "engine",
        "ngram guesses what an answer repeats and checks it in one step: the same answers, sooner",
    )
    tool_parser: str = option(
        EngineConfig.tool_parser,
        "engine",
        "form of calls in answers to chats with tools, as hermes or llama3_json; auto is the one that the "
        "chat template plainly shows",
        "NAME",
        flags=("--tool-call-parser",),
    )
    reasoning_parser: str = option(
        EngineConfig.reasoning_parser,
        "engine",
        "form of reasoning that is set apart from answers of chats, as qwen3 or deepseek_r1; auto is the one "
        "that the chat template plainly shows, none leaves it in the text",
        "NAME",
    )
    threads: Count | None = option(
        None,
        "engine",
        "CPU threads to compute with (default: all cores)",
        "N",
        most=MAX_COUNTS["num_threads"],
    )
    tensor_parallel_size: Count = option(
        EngineConfig.tensor_parallel_size,
        "engine",
        "processes that share the model out among them, as the cores and --memory (CPU only)",
        "N",
        flags=("-tp",),
        most=MAX_COUNTS["tensor_parallel_size"],
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

    response_store_memory: Size = option(
        64 * 2**20,
        "server",
        "memory for responses of /v1/responses that their callers may go on from, as 64MiB; 0 keeps none",
        "SIZE",
    )
    response_store_seconds: Seconds = option(24 * 3600.0, "server", "forget responses after this time", "S")

    max_concurrent_requests: Count | None = option(
        None,
        "limits",
        "requests that may run at once, of all callers together (default: no limit)",
        "N",
        env=("MAX_CONCURRENT_REQUESTS",),
    )
    fair_by: FairBy | None = option(
        None,
        "limits",
        "who has equal shares of the tokens where requests wait: keys, adapters, or adapters of keys; off "
        "is first come, first served (default: key where keys are configured, else adapter)",
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
        "YAML file of keys: name, secret, adapters, requests_per_minute, tokens_per_minute, max_concurrent, "
        "weight, admin",
        "FILE",
    )
    keys: tuple[KeySettings, ...] = Field(default=())
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
        parse_memory(self.batch_dir_size, "batch_dir_size")
        check_tool_parser(self.tool_parser)
        check_reasoning_parser(self.reasoning_parser)
        for name in self.adapters:
            check_adapter_name(name, self.served_names)
        if self.max_replicas is not None and self.max_replicas < (self.replicas or 1):
            raise ValueError(f"max_replicas is {self.max_replicas}, fewer than replicas, {self.replicas}")
        if self.merge is not None:
            check_merge(self.merge, self.adapters)
        if self.http_port is None and self.grpc_port is None:
            raise ValueError("http_port and grpc_port are both off, serve at least one API")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("give both tls_certificate and tls_key, or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        return self

    @property
    def served_names(self) -> tuple[str, ...]:
        """Names of the base model, at least one; the first is the one that answers carry."""
        return self.served_model_name or (self.model,)
