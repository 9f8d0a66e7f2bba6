"""Engine settings, validated once."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from loraserve.adapters.history import GenerationHistory
from loraserve.adapters.manifest import AdapterManifest
from loraserve.adapters.registry import check_base_names
from loraserve.adapters.startup import ON_ADAPTER_ERROR, AdapterFailure, start_error
from loraserve.errors import InvalidRequestError
from loraserve.tools.families import check_reasoning_parser, check_tool_parser
from loraserve.validation.values import check_bool, check_choice, check_float, check_int

DTYPES = ("bfloat16", "float16", "float32")
DTYPE_ALIASES = {"auto": "bfloat16", "half": "float16", "float": "float32"}
DEVICES = ("auto", "cpu", "cuda")
SPECULATIONS = ("off", "ngram")
ADAPTER_DTYPES = ("auto", "int8")
# What weights can be made at load, or must be in the checkpoint; "auto" is what the checkpoint says.
QUANTIZATIONS = ("auto", "none", "int8", "int4", "gguf", "awq", "gptq", "compressed-tensors")
QUANTIZATION_ALIASES = {"awq_marlin": "awq", "gptq_marlin": "gptq"}

BLOCK_SIZE = 16  # tokens of a page of the pool
MAX_MEMORY = 2**62
AUTO = "auto"

# Most that a setting may be; what an engine can do with a machine is checked against the machine.
MAX_KEPT_GENERATIONS = 64
CPU_PREFILL_TOKENS = 256
CPU_PREFILL_BESIDE_DECODES = 64

MAX_COUNTS = {
    "max_lora_rank": 2**16,
    "max_num_seqs": 2**16,
    "max_batched_tokens": 2**20,
    "max_prefill_tokens": 2**20,
    "max_waiting": 2**31 - 1,
    "max_model_len": 2**31 - 1,
    "num_threads": 1024,
    "tensor_parallel_size": 64,
}
_OPTIONAL_COUNTS = ("max_prefill_tokens", "max_waiting", "max_model_len", "num_threads")

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything an engine needs to start.

    Args:
        model: a Hugging Face directory, a Hub id, a `.gguf` file, or "smollm2" (the embedded default).
        adapters: name → PEFT directory, registered at start.
        base_names: what requests call the base model; no adapter can be called so, nor NAME:ADAPTER.
        merge: the one adapter of `adapters`, folded into the model's weights at load, in float32 and rounded
            once; the model is then that adapter, at the model's speed, and nothing can be loaded beside it.
        manifests: name → what is said of an adapter here, over its own `loraserve.json`.
        dtype: storage of weights, KV cache and adapters: "bfloat16", "float16" (GPU only) or "float32" (CPU
            only); also vLLM's names "half", "float" and "auto", which is bfloat16 here.
        quantization: None (or "auto") leaves weights as the checkpoint has quantised them (.gguf, AWQ, GPTQ,
            compressed-tensors), on a GPU dequantised; "none" dequantises them to `dtype`; "int8" or "int4"
            quantises float weights at load, on the CPU; a checkpoint's own method is checked against it.
        adapter_dtype: what adapters are kept in: "auto" is `dtype`; "int8" keeps A and B of linears and head
            in a byte a value, with a scale for each rank (CPU only), so that nearly twice as many fit into
            the pool as in bfloat16. Rows, norms, biases and magnitudes of adapters stay in floats.
        device: "cpu", "cuda" (one NVIDIA GPU), or "auto", which takes a GPU that can run the kernels.
        memory: bytes of the one pool that KV cache and adapters share, or text such as "2GiB"; "auto" takes
            three quarters of what is free beside the weights, on a GPU what `gpu_memory_utilization` leaves,
            and no more than `max_num_seqs` can use.
        keep_generations: earlier versions of each adapter's name that requests may still pin and a rollback
            may lead to; 0 keeps none.
        adapter_host_memory: most bytes of main memory, or text such as "2GiB", that keep adapters as they lay
            in the pool, so that an evicted one returns by a copy; 0 keeps none, "auto" takes half of what
            weights and pool leave free.
        gpu_memory_utilization: share of a GPU's memory that this process may use, weights and all; what the
            weights and the largest step leave of it is the pool, where `memory` is "auto".
        cuda_graphs: capture decode steps on a GPU at start; without, each step takes longer, the start less.
        max_lora_rank: adapters of a higher rank are refused.
        max_num_seqs: most sequences in one step.
        max_batch_adapter_memory: most bytes, or text such as "256MiB", of different adapters that run at
            once, as they lie in the pool; requests for others wait; "auto" sets no limit.
        max_batched_tokens: most tokens in one step; at least `max_prefill_tokens`, to which less is raised.
        max_prefill_tokens: of these, tokens of prompts, whose rest goes on in the next steps; None takes 256
            on a CPU, where longer steps are no faster, and what fits on a GPU. Beside sequences that decode a
            CPU gives prompts of the same flow less.
        max_waiting: most sequences that wait for their turn; beyond, requests are refused as OverloadedError;
            None sets no limit.
        max_model_len: context limit in tokens; None takes the model's own, or what the pool holds if that is
            less.
        generation_config: where defaults of sampling come from, for what neither a request nor its adapter
            gives: "auto" is the model's own generation_config.json, "none" (vLLM's "vllm") is nowhere, and an
            adapter's own file does not count either; else a directory with such a file.
        prefix_caching: keep KV blocks of finished requests for later ones with the same prefix and adapter.
        speculate: "ngram" guesses the next tokens of an answer, from what followed its last ones before and
            from its grammar where that leaves no choice, and checks them in one step: answers stay the same,
            those that repeat something come sooner (CPU only). "off" computes one token at a time.
        tool_parser: form of the calls that answers of chats with tools are looked through for, one of
            `TOOL_PARSERS`; "auto" is the one that the chat template plainly shows.
        reasoning_parser: form of the reasoning that is set apart from answers of chats, one of
            `REASONING_PARSERS`; "auto" is as of calls, "none" leaves it in the text.
        num_threads: CPU threads of the kernels, of all ranks together; None uses every core this process may
            run on.
        tensor_parallel_size: processes that share the model out among them, each with a part of every linear
            and of every adapter (CPU only); 1 is this process alone.
        on_adapter_error: what an adapter that can't be served does to the start: "fail" raises one error that
            names all such adapters, "skip" goes on without them (`adapter_failures` of the engine).
        failed_adapters: what failed before, as a download; counts as the others.
        histories: of generations of an earlier process, by the adapter's name.

    Raises:
        InvalidRequestError: a value is out of its range.
    """

    model: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    base_names: tuple[str, ...] = ()
    merge: str | None = None
    manifests: Mapping[str, AdapterManifest] = field(default_factory=dict)
    dtype: str = "bfloat16"
    quantization: str | None = None
    adapter_dtype: str = "auto"
    device: str = "auto"
    memory: int | str = AUTO
    keep_generations: int = 1
    adapter_host_memory: int | str = AUTO
    gpu_memory_utilization: float = 0.9
    cuda_graphs: bool = True
    max_lora_rank: int = 64
    max_num_seqs: int = 256
    max_batch_adapter_memory: int | str = AUTO
    max_batched_tokens: int = 2048
    max_prefill_tokens: int | None = None
    max_waiting: int | None = 1024
    max_model_len: int | None = None
    generation_config: str = "auto"
    prefix_caching: bool = True
    speculate: str = "off"
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    num_threads: int | None = None
    tensor_parallel_size: int = 1
    on_adapter_error: str = "fail"
    failed_adapters: tuple[AdapterFailure, ...] = ()
    histories: Mapping[str, GenerationHistory] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", _path_text("model", self.model))
        object.__setattr__(self, "adapters", _checked_adapters(self.adapters))
        if not isinstance(self.manifests, Mapping):
            raise InvalidRequestError(f"manifests is {self.manifests!r:.100}, give {{name: AdapterManifest}}")
        for name, manifest in self.manifests.items():
            if not isinstance(manifest, AdapterManifest):
                raise InvalidRequestError(
                    f"manifest of {name!r:.100} is {manifest!r:.100}, give AdapterManifest"
                )
        _check_histories(self.histories)
        source = _path_text("generation_config", self.generation_config)
        object.__setattr__(self, "generation_config", "none" if source == "vllm" else source)
        check_choice("dtype", self.dtype, (*DTYPES, *DTYPE_ALIASES))
        object.__setattr__(self, "dtype", DTYPE_ALIASES.get(self.dtype, self.dtype))
        check_choice("device", self.device, DEVICES)
        check_choice("adapter_dtype", self.adapter_dtype, ADAPTER_DTYPES)
        for name, high in MAX_COUNTS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL_COUNTS:
                check_int(name, value, 1, high)
        most = max(self.max_batched_tokens, self.max_prefill_tokens or 0)
        object.__setattr__(self, "max_batched_tokens", most)
        check_int("keep_generations", self.keep_generations, 0, MAX_KEPT_GENERATIONS)
        check_choice("speculate", self.speculate, SPECULATIONS)
        check_tool_parser(self.tool_parser)
        check_reasoning_parser(self.reasoning_parser)
        check_bool("prefix_caching", self.prefix_caching)
        check_bool("cuda_graphs", self.cuda_graphs)
        check_float("gpu_memory_utilization", self.gpu_memory_utilization, 0.01, 1.0)
        if not isinstance(self.base_names, tuple) or not all(isinstance(one, str) for one in self.base_names):
            raise InvalidRequestError(f"base_names is {self.base_names!r:.100}, give a tuple of names")
        check_base_names(self.base_names)
        check_choice("on_adapter_error", self.on_adapter_error, ON_ADAPTER_ERROR)
        if not isinstance(self.failed_adapters, tuple):
            raise InvalidRequestError(f"failed_adapters is {self.failed_adapters!r:.100}, give a tuple")
        for name in self.manifests:
            if name not in self.adapters:
                raise InvalidRequestError(f"manifests has {name!r}, which is none of the adapters")
        if self.merge is not None:
            given = [*self.adapters, *(failure.name for failure in self.failed_adapters)]
            check_merge(self.merge, given, self.adapter_dtype)
            if self.failed_adapters:
                raise start_error(self.failed_adapters)
        parse_memory(self.memory)
        parse_memory(self.adapter_host_memory, "adapter_host_memory", least=0)
        parse_memory(self.max_batch_adapter_memory, "max_batch_adapter_memory")
        if self.quantization is not None:
            object.__setattr__(self, "quantization", parse_quantization(self.quantization))
        self._check_tensor_parallel()

    def _check_tensor_parallel(self) -> None:
        if self.tensor_parallel_size == 1:
            return
        size = f"tensor_parallel_size is {self.tensor_parallel_size}"
        if self.merge is not None:
            raise InvalidRequestError(
                f"{size}, and merge folds {self.merge!r:.100} into the weights of one process: leave "
                "--merge away"
            )
        if self.quantization in ("int8", "int4"):
            raise InvalidRequestError(
                f"{size}, and quantization is {self.quantization}: ranks compute with dense weights, leave "
                "--quantization away"
            )
        if self.device == "cuda":
            raise InvalidRequestError(
                f"{size}, which only a CPU can do, and device is cuda: give --device cpu"
            )

    @property
    def model_names(self) -> tuple[str, ...]:
        """What the base model may be meant by, as given first."""
        return tuple(dict.fromkeys((self.model, *self.base_names)))

    @property
    def memory_nbytes(self) -> int | None:
        """Bytes of the pool; None where the device's memory decides."""
        return parse_memory(self.memory)

    @property
    def max_batch_adapter_nbytes(self) -> int | None:
        """Most bytes of different adapters that run at once; None without a limit."""
        return parse_memory(self.max_batch_adapter_memory, "max_batch_adapter_memory")

    @property
    def adapter_host_nbytes(self) -> int | None:
        """Most bytes of main memory that keep adapters; None where what is free decides."""
        return parse_memory(self.adapter_host_memory, "adapter_host_memory", least=0)

    def prefill_tokens(self, device: str) -> tuple[int | None, int | None]:
        """Most tokens of prompts in a step of "cpu" or "cuda", and beside decodes of their flow; None: any.

        A CPU's steps are as long as they have rows, and from some hundred on no faster; a GPU's are as
        long for some hundred rows as for one. Beside decodes a CPU gives prompts twice their rows if that is
        more.
        """
        if device == "cpu":
            return self.max_prefill_tokens or CPU_PREFILL_TOKENS, CPU_PREFILL_BESIDE_DECODES
        return self.max_prefill_tokens, None

    def check_speculate(self, speculate: bool | None) -> None:
        """Raises InvalidRequestError: a request asks for guesses of an engine that makes none."""
        if speculate and self.speculate == "off":
            raise InvalidRequestError(
                "speculate is true, but the engine was started with --speculate off: leave it out, "
                "or start it with --speculate ngram"
            )


def check_merge(name: object, adapters: Iterable[str], adapter_dtype: str = "auto") -> None:
    """Raises InvalidRequestError: it is none of `adapters`, or not the only one, or to be kept in a dtype."""
    if not isinstance(name, str):
        raise InvalidRequestError(f"merge is {name!r:.100}, give the name of the adapter to fold in")
    adapters = list(adapters)
    if name not in adapters:
        raise InvalidRequestError(
            f"merge is {name!r:.100}, which is none of the adapters: give it as --adapter NAME=PATH, too"
        )
    others = [other for other in adapters if other != name]
    if others:
        raise InvalidRequestError(
            f"merge folds {name!r} into the model, and {others[0]!r:.100} can't be served beside it: leave "
            "that away, or leave --merge away to mix them"
        )
    if adapter_dtype != "auto":
        raise InvalidRequestError(
            f"adapter_dtype is {adapter_dtype!r}, and merge folds {name!r:.100} into the weights, beside "
            "which no adapter is kept: leave --adapter-dtype away"
        )


def parse_memory(memory: int | str, name: str = "memory", *, least: int = 1) -> int | None:
    """Bytes of `memory`: an integer, or text such as "512MiB", "2GiB", "1.5 GB"; "2G" is 2 GB.

    None for "auto". Raises InvalidRequestError: `name` is no size, or not from `least` to `MAX_MEMORY` bytes.
    """
    if memory == AUTO:
        return None
    if not isinstance(memory, int | str) or isinstance(memory, bool):
        raise InvalidRequestError(f"{name} is {memory!r}, give bytes as an integer, or text such as 2GiB")
    if isinstance(memory, int):
        nbytes = memory
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b?)\s*", memory.lower())
        unit = match and _UNITS.get(match[2] if match[2] in _UNITS else match[2] + "b")
        if match is None or unit is None:
            raise InvalidRequestError(f"{name} is {memory!r}, write it as 512MiB, 2GiB or auto")
        nbytes = int(Decimal(match[1]) * unit)
    if nbytes < least:
        bound = "more than 0 bytes" if least == 1 else f"at least {least} bytes"
        raise InvalidRequestError(f"{name} is {memory!r}, it must be {bound}")
    if nbytes > MAX_MEMORY:
        raise InvalidRequestError(f"{name} is {memory!r}, it must be at most {MAX_MEMORY} bytes")
    return nbytes


def parse_quantization(value: object) -> str | None:
    """One of `QUANTIZATIONS`, also by vLLM's names; None for "auto".

    Raises InvalidRequestError: a way to quantise that is not known here.
    """
    name = QUANTIZATION_ALIASES.get(value, value) if isinstance(value, str) else value
    if name not in QUANTIZATIONS:
        raise InvalidRequestError(
            f"quantization is {value!r:.100}, it must be one of {', '.join(QUANTIZATIONS)}: int8 and int4 "
            "quantise float weights at load, other checkpoints say themselves how they are quantised"
        )
    return None if name == "auto" else str(name)


def _check_histories(histories: object) -> None:
    given = histories.values() if isinstance(histories, Mapping) else [None]
    if not all(isinstance(one, GenerationHistory) for one in given):
        raise InvalidRequestError(f"histories is {histories!r:.100}, give {{name: GenerationHistory}}")


def _checked_adapters(adapters: object) -> dict[str, str]:
    if not isinstance(adapters, Mapping):
        raise InvalidRequestError(f"adapters is {adapters!r:.100}, give {{name: directory}}")
    for name in adapters:
        if not isinstance(name, str):
            raise InvalidRequestError(f"adapters has the name {name!r:.100}, it must be text")
    return {name: _path_text(f"adapter {name!r:.100}", path) for name, path in adapters.items()}


def _path_text(name: str, value: object) -> str:
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text:
        raise InvalidRequestError(f"{name} is {value!r:.100}, it must be a path or a name, as text")
    return text
