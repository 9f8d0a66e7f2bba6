"""What the launchers of TGI, LoRAX and vLLM can be told beyond the settings of this server.

A setting that only has another name there is listed with the setting itself (`schema.py`). Here is the
rest: each stands for settings, says what is so anyway, has no effect and is noted, or is refused.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from loraserve.adapters.source import AdapterSource, parse_lora_adapters
from loraserve.config import parse_quantization
from loraserve.errors import InvalidRequestError
from loraserve.settings.errors import ConfigError

Meaning: TypeAlias = "Callable[[str], Mapping[str, Any]]"

TRUE = ("true", "1", "yes", "on")
FALSE = ("false", "0", "no", "off")


@dataclass(frozen=True, kw_only=True)
class ForeignSetting:
    """One setting of another launcher.

    Args:
        name: the flag is --name with "-" for "_", TGI's and LoRAX' variable is NAME.
        text: what becomes of it, for help and for errors.
        metavar: of its value; "" is a switch.
        accepted: values that say what is so anyway; with None any value is taken and has no effect.
        noted: values that are taken, too, and of which a note says that they have no effect by themselves.
        meaning: or else the settings that a value stands for.
        is_variable: whether the launcher reads it from the environment.
        is_flag: whether the launcher has a flag of it.
        short: further flags.
        is_list: whether the flag takes several values.
    """

    name: str
    text: str
    metavar: str = ""
    accepted: tuple[str, ...] | None = ()
    noted: tuple[str, ...] = ()
    meaning: Meaning | None = None
    is_variable: bool = True
    is_flag: bool = True
    short: tuple[str, ...] = ()
    is_list: bool = False

    @property
    def flag(self) -> str:
        """Its long flag."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        """The variable that the other launcher reads, if `is_variable`."""
        return self.name.upper()

    def read(self, value: str, where: str) -> tuple[Mapping[str, Any], str | None]:
        """(settings, a note on what has no effect). Raises ConfigError: it is refused; `where` names it."""
        if self.metavar == "":
            value = "true" if value.lower() in TRUE else "false" if value.lower() in FALSE else value
        if self.meaning is not None:
            try:
                return self.meaning(value), None
            except (InvalidRequestError, ValueError) as error:
                raise ConfigError(f"{where}: {error}") from None
        if self.accepted is None or value in self.noted:
            return {}, f"{where} has no effect here: {self.text}"
        if value in self.accepted or (self.metavar == "" and value == "false" and not self.accepted):
            return {}, None
        raise ConfigError(f"{where} is {value!r:.100}: {self.text}")


_WHERE = {"local": "path", "hub": "repo", "remote": "url"}


def adapter_values(sources: Mapping[str, AdapterSource]) -> dict[str, Any]:
    """Sources as the values of `adapters`."""
    return {
        name: {_WHERE[source.kind]: source.location, "revision": source.revision}
        for name, source in sources.items()
    }


def variable_settings(environ: Mapping[str, str]) -> tuple[dict[str, tuple[str, Any]], list[str]]:
    """(field → (variable, value), notes) of other launchers' variables; an empty variable is as none."""
    found: dict[str, tuple[str, Any]] = {}
    notes: list[str] = []
    for setting in FOREIGN_SETTINGS:
        value = environ.get(setting.variable)
        if not value or not setting.is_variable:
            continue
        settings, note = setting.read(value, setting.variable)
        found |= {name: (setting.variable, given) for name, given in settings.items()}
        notes += [] if note is None else [note]
    return found, notes


def _json_output(value: str) -> Mapping[str, Any]:
    return {"log_format": "json"} if value == "true" else {}


def _eager(value: str) -> Mapping[str, Any]:
    return {"cuda_graphs": False} if value == "true" else {}


def _quantize(value: str) -> Mapping[str, Any]:
    return {"quantization": parse_quantization(value) or "auto"}


def _num_shard(value: str) -> Mapping[str, Any]:
    return {"tensor_parallel_size": value}


def _cuda_graphs(value: str) -> Mapping[str, Any]:
    """Batch sizes with commas between, 0 is none."""
    return {"cuda_graphs": False} if value.strip() == "0" else {}


def _speculate(value: str) -> Mapping[str, Any]:
    """How many tokens to guess ahead."""
    count = value.strip()
    return {"speculate": value if not count.isdigit() else "off" if int(count) == 0 else "ngram"}


def _log_format(value: str) -> Mapping[str, Any]:
    return {"log_format": value.lower()}


def _log_level(value: str) -> Mapping[str, Any]:
    """Rust's levels, of which `info,name=debug` gives single modules others."""
    level = value.lower().split(",")[0]
    return {"log_level": {"trace": "debug", "warn": "warning"}.get(level, level)}


def _hostname(value: str) -> Mapping[str, Any]:
    """An address; a name is what a shell or Docker calls this machine, and TGI passes over it as well."""
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return {}
    return {"host": value}


def _preloaded(value: str) -> Mapping[str, Any]:
    adapters = adapter_values(parse_lora_adapters(value))
    return {"adapters": {name: adapter | {"warm": True} for name, adapter in adapters.items()}}


def _lora_module(value: str) -> Mapping[str, Any]:
    """vLLM's `name=path`, or {"name": …, "path": …, "base_model_name": …} in JSON."""
    if not value.lstrip().startswith(("{", "[")):
        name, separator, source = value.partition("=")
        if not (name and separator and source):
            raise ValueError(f'{value!r:.200} is neither name=path nor {{"name": …, "path": …}}')
        return {"adapters": {name: source}}
    try:
        given = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{value!r:.200} is not JSON: {error}") from None
    adapters: dict[str, Any] = {}
    for module in given if isinstance(given, list) else [given]:
        is_module = isinstance(module, dict) and {"name", "path"} <= module.keys()
        if not is_module or not module.keys() <= {"name", "path", "base_model_name"}:
            raise ValueError(f'{module!r:.200} is not {{"name": …, "path": …, "base_model_name": …}}')
        if not all(isinstance(text, str) for text in (module["name"], module["path"])):
            raise ValueError(f"{module!r:.200} has a name or a path that is no text")
        adapters[module["name"]] = module["path"]
    return {"adapters": adapters}


def _switches(names: str, text: str, **more: Any) -> Iterable[ForeignSetting]:
    return (ForeignSetting(name=name, text=text, **more) for name in names.split())


def _values(names: str, text: str, metavar: str = "VALUE", **more: Any) -> Iterable[ForeignSetting]:
    return (ForeignSetting(name=name, text=text, metavar=metavar, **more) for name in names.split())


NO_EFFECT: dict[str, Any] = {"accepted": None}
FLAG_ONLY: dict[str, Any] = {"is_variable": False}
VARIABLE_ONLY: dict[str, Any] = {"is_flag": False}
TASKS = ("auto", "generate", "pooling", "embed", "embedding", "classify", "score", "reward")
CACHE = "set the variable HF_HUB_CACHE to the folder instead"
CACHE_DTYPE = "the KV cache has the dtype of --dtype, leave it away"
MEMORY_SIZES = "--memory says what KV cache and adapters take together"
SEVERAL_ENGINES = "only 1 is possible, `loraserve deploy --replicas N` runs several engines"
NO_PIPELINE = "only 1 is possible, --tensor-parallel-size shares a model out among processes"
FROM_MODEL = "put the file into the model's directory, from where it is read"
NO_TUNNEL = "no tunnel is opened, run one beside the server"

TGI_AND_LORAX: tuple[ForeignSetting, ...] = (
    *_values("hostname", "the address of --host", "ADDRESS", meaning=_hostname, **VARIABLE_ONLY),
    *_switches("json_output", "the same as --log-format json", meaning=_json_output),
    *_values("log_level", "the level of --log-level", "LEVEL", meaning=_log_level, **VARIABLE_ONLY),
    *_values("log_format", "the format of --log-format", "FORMAT", meaning=_log_format, **VARIABLE_ONLY),
    *_values(
        "preloaded_adapter_ids", "adapters that are loaded at start, as --lora-adapters lists them", "LIST",
        meaning=_preloaded,
    ),
    *_values("num_shard", "the same as --tensor-parallel-size", "N", meaning=_num_shard),
    *_values("sharded", "--tensor-parallel-size, or --num-shard, says among how many processes", "BOOL",
             accepted=FALSE, noted=TRUE),
    *_values("quantize", "the same as --quantization", "METHOD", meaning=_quantize),
    *_values("kv_cache_dtype", CACHE_DTYPE, "DTYPE", accepted=("auto",)),
    *_values("source default_adapter_source preloaded_adapter_source",
             "name what is served by its directory, its id on the Hub or an adapter's URL (--adapter-url)",
             "hub|local", accepted=("hub", "local")),
    *_values("adapter_id", "no adapter applies to all requests: serve it by --adapter NAME=SOURCE, "
             "requests name it", "ID"),
    *_switches("merge_adapter_weights", "--adapter NAME=SOURCE --merge NAME folds that adapter in"),
    *_values("rope_scaling rope_factor", "write it into the model's config.json, from where it is read"),
    *_values("weights_cache_override", "give the directory as MODEL instead", "DIRECTORY"),
    *_values("tokenizer_config_path", FROM_MODEL, "FILE"),
    *_values("huggingface_hub_cache", CACHE, "DIRECTORY", **FLAG_ONLY),
    *_switches("disable_grammar_support", "grammars can't be switched off, leave it away"),
    *_switches("enable_prefill_logprobs", "requests that ask for them have log-probabilities of prompts",
               **NO_EFFECT),
    *_switches("ngrok", NO_TUNNEL),
    *_values("ngrok_authtoken ngrok_edge", NO_TUNNEL, **NO_EFFECT),
    *_switches("download_only", "nothing is downloaded without serving: use `hf download MODEL`"),
    *_switches("env", "run `loraserve doctor` instead", **FLAG_ONLY),
    *_values("prometheus_port", "metrics are at /metrics of the HTTP port", "PORT", **NO_EFFECT),
    *_values("memory_wiggle_room adapter_memory_fraction", MEMORY_SIZES, "X", **NO_EFFECT),
    *_values("max_batch_total_tokens", "--memory bounds the batch", "TOKENS", **NO_EFFECT),
    *_values("waiting_served_ratio max_waiting_tokens", "waiting requests join at every step", "X",
             **NO_EFFECT),
    *_values("max_active_adapters", "a batch mixes as many adapters as fit in --memory", "N", **NO_EFFECT),
    *_values("adapter_cycle_time_s", "adapters take no turns, a batch mixes them", "S", **NO_EFFECT),
    *_values("speculate", "above 0 the same as --speculate ngram", "N", meaning=_speculate, **VARIABLE_ONLY),
    *_values("speculative_tokens speculation_max_batch_size", "it is decided here, see --speculate",
             "N", **NO_EFFECT),
    *_values("validation_workers", "tokenising takes a thread when it needs one", "N", **NO_EFFECT),
    *_values("compile_max_batch_size compile_max_rank compile_batch_size", "it tunes another engine", "N",
             **NO_EFFECT),
    *_values("cuda_graphs", "sizes are chosen by --max-num-seqs, 0 is --no-cuda-graphs", "SIZES",
             meaning=_cuda_graphs, **VARIABLE_ONLY),
    *_values("backend attention embedding_dim", "it tunes another engine", **NO_EFFECT),
    *_switches("eager", "the same as --no-cuda-graphs", meaning=_eager),
    *_switches("compile disable_custom_kernels disable_sgmv", "it tunes another engine", **NO_EFFECT),
    *_values("eager_prefill chunked_prefill prefill_chunking", "long prompts are always prefilled in chunks",
             "BOOL", **NO_EFFECT),
    *_values("shard_uds_path master_addr master_port", "there are no shards", **NO_EFFECT),
    *_values("watermark_gamma watermark_delta", "answers have no watermark", "X", **NO_EFFECT),
    *_values("cors_allow_header cors_allow_method cors_expose_header cors_allow_credentials",
             "origins of --cors-origin may send every header and method that the API has", **NO_EFFECT),
    *_values("predibase_api_token", "nothing is fetched from Predibase", "TOKEN", **NO_EFFECT),
    *_values("usage_stats", "nothing is ever reported", "MODE", accepted=("on", "off", "no-stack")),
    *_switches("trust_remote_code", "code of a model's repository never runs", **NO_EFFECT),
    *_values("request_logger_url", "requests are not sent elsewhere, see --otlp-endpoint", "URL",
             **(NO_EFFECT | VARIABLE_ONLY)),
)  # fmt: skip

VLLM: tuple[ForeignSetting, ...] = (
    *_values("lora_modules", "adapters as name=path or in JSON", "MODULE", meaning=_lora_module, is_list=True,
             **FLAG_ONLY),
    *_switches("enable_lora", "adapters are served where any are given, give none", accepted=("true",),
               **FLAG_ONLY),
    *_values("max_loras", "a batch mixes any number of adapters", "N", **(NO_EFFECT | FLAG_ONLY)),
    *_values("max_cpu_loras", "--adapter-host-memory bounds what is kept beside --memory, in bytes", "N",
             **(NO_EFFECT | FLAG_ONLY)),
    *_values("lora_dtype", "adapters are kept in what --adapter-dtype says", "DTYPE", accepted=("auto",),
             **FLAG_ONLY),
    *_values("lora_extra_vocab_size", "tokens that adapters add are served as they are", "N",
             **(NO_EFFECT | FLAG_ONLY)),
    *_values("swap_space cpu_offload_gb block_size", MEMORY_SIZES, "N", **(NO_EFFECT | FLAG_ONLY)),
    *_values("pipeline_parallel_size", NO_PIPELINE, "N", accepted=("1",), short=("-pp",), **FLAG_ONLY),
    *_values("data_parallel_size", SEVERAL_ENGINES, "N", accepted=("1",), short=("-dp",), **FLAG_ONLY),
    *_values("load_format", "weights are read from safetensors and GGUF", "FORMAT",
             accepted=("auto", "safetensors", "gguf"), **FLAG_ONLY),
    *_values("tokenizer tokenizer_revision", "the tokenizer is the model's: " + FROM_MODEL, "NAME",
             **FLAG_ONLY),
    *_values("tokenizer_mode", "the tokenizer is the model's", "MODE", accepted=("auto",), **FLAG_ONLY),
    *_values("chat_template", FROM_MODEL + " (chat_template.jinja), or into an adapter's loraserve.json",
             "FILE", **FLAG_ONLY),
    *_values("override_generation_config", "give it in requests or in an adapter's loraserve.json", "JSON",
             **FLAG_ONLY),
    *_values("download_dir", CACHE, "DIRECTORY", **FLAG_ONLY),
    *_values("seed", "give requests a seed", "N", **(NO_EFFECT | FLAG_ONLY)),
    *_values("root_path", "routes have no prefix, let the proxy take it away", "PATH", **FLAG_ONLY),
    *_values("ssl_ca_certs", "give --tls-client-ca, then every client must show a certificate", "FILE",
             **FLAG_ONLY),
    *_switches("enable_auto_tool_choice enable_reasoning", "it is always so", **(NO_EFFECT | FLAG_ONLY)),
    *_switches("enable_chunked_prefill", "long prompts are always prefilled in chunks",
               **(NO_EFFECT | FLAG_ONLY)),
    *_switches("enforce_eager", "the same as --no-cuda-graphs", meaning=_eager, **FLAG_ONLY),
    *_switches("disable_log_requests disable_log_stats enable_log_requests",
               "it tunes another engine", **(NO_EFFECT | FLAG_ONLY)),
    *_values("uvicorn_log_level", "see --log-level", "LEVEL", **(NO_EFFECT | FLAG_ONLY)),
    *_values("task runner", "each request says whether it wants text, embeddings, classes or scores", "NAME",
             accepted=TASKS, **FLAG_ONLY),
    *_values("hf_token", "set the variable HF_TOKEN: others see a program's flags", "TOKEN", **FLAG_ONLY),
    *_values("hf_overrides", "write it into the model's config.json, from where it is read", "JSON",
             **FLAG_ONLY),
    *_values("api_server_count", "one process serves", "N", accepted=("1",), **FLAG_ONLY),
    *_values("response_role", "answers are of role assistant", "ROLE", accepted=("assistant",), **FLAG_ONLY),
    *_values("speculative_config", "there are no draft models, see --speculate", "JSON",
             **(NO_EFFECT | FLAG_ONLY)),
    *_values("lora_target_modules", "every module of an adapter is applied, leave it away", "NAMES",
             **FLAG_ONLY),
    *_values("limit_mm_per_prompt", "models read text only", "JSON", **(NO_EFFECT | FLAG_ONLY)),
    *_values("uds", "give --host and --port: no sockets of files are listened on", "PATH", **FLAG_ONLY),
    *_values("scheduling_policy", "requests are answered in order", "NAME", accepted=("fcfs",), **FLAG_ONLY),
    *_values("num_gpu_blocks_override", MEMORY_SIZES, "N", **(NO_EFFECT | FLAG_ONLY)),
    *_values("guided_decoding_backend max_seq_len_to_capture distributed_executor_backend max_log_len",
             "it tunes another engine", **(NO_EFFECT | FLAG_ONLY)),
    *_switches("fully_sharded_loras enable_prompt_tokens_details disable_frontend_multiprocessing "
               "async_scheduling", "it tunes another engine", **(NO_EFFECT | FLAG_ONLY)),
    *_switches("enable_sleep_mode", "the engine does not sleep, leave it away", **FLAG_ONLY),
)  # fmt: skip

SGLANG_AND_LLAMA_CPP: tuple[ForeignSetting, ...] = (
    *_values("mem_fraction_static", MEMORY_SIZES, "X", **(NO_EFFECT | FLAG_ONLY)),
    *_values("max_loras_per_batch", "a batch mixes any number of adapters", "N", **(NO_EFFECT | FLAG_ONLY)),
    *_values("lora_paths lora", "serve it by --adapter NAME=PATH", "PATH", **FLAG_ONLY),
    *_values("ctx_size context_length", "give --max-model-len instead", "TOKENS", **FLAG_ONLY),
    *_values("n_gpu_layers", "give --device instead", "N", **FLAG_ONLY),
)  # fmt: skip

FOREIGN_SETTINGS = TGI_AND_LORAX + VLLM + SGLANG_AND_LLAMA_CPP
