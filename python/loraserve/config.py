"""Engine settings, validated once."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from loraserve.adapters.manifest import AdapterManifest
from loraserve.errors import InvalidRequestError

DTYPES = ("bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")

MAX_MEMORY = 2**62

_COUNTS = (
    "max_lora_rank",
    "max_num_seqs",
    "max_batched_tokens",
    "max_waiting",
    "max_model_len",
    "num_threads",
)

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything an engine needs to start.

    Args:
        model: a Hugging Face directory, a Hub id, a `.gguf` file, or "smollm2" (the embedded default).
        adapters: name → PEFT directory, registered at start.
        manifests: name → what is said of an adapter here, over its own `loraserve.json`.
        dtype: storage of weights, KV cache and adapters: "bfloat16", "float16" (GPU only) or "float32" (CPU
            only).
        device: "cpu", "cuda" (one NVIDIA GPU), or "auto", which takes a GPU if torch sees one.
        memory: bytes of the one pool that KV cache and adapters share, or text such as "2GiB".
        max_lora_rank: adapters of a higher rank are refused.
        max_num_seqs: most sequences in one step.
        max_batched_tokens: most tokens in one step; longer prompts are prefilled in chunks.
        max_waiting: most sequences that wait for their turn; beyond, requests are refused as OverloadedError;
            None sets no limit.
        max_model_len: context limit in tokens; None takes the model's own.
        prefix_caching: keep KV blocks of finished requests for later ones with the same prefix and adapter.
        num_threads: CPU threads of the kernels; None uses every core this process may run on.

    Raises:
        InvalidRequestError: a value is out of its range.
    """

    model: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    manifests: Mapping[str, AdapterManifest] = field(default_factory=dict)
    dtype: str = "bfloat16"
    device: str = "auto"
    memory: int | str = "2GiB"
    max_lora_rank: int = 64
    max_num_seqs: int = 256
    max_batched_tokens: int = 2048
    max_waiting: int | None = 1024
    max_model_len: int | None = None
    prefix_caching: bool = True
    num_threads: int | None = None

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("device", self.device, DEVICES)
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequestError(f"{name} is {value}, it must be at least 1")
        for name in self.manifests:
            if name not in self.adapters:
                raise InvalidRequestError(f"manifests has {name!r}, which is none of the adapters")
        parse_memory(self.memory)

    @property
    def memory_nbytes(self) -> int:
        return parse_memory(self.memory)


def parse_memory(memory: int | str) -> int:
    """Bytes of `memory`: an integer, or text such as "512MiB", "2GiB", "1.5 GB"; "2G" is 2 GB."""
    if not isinstance(memory, int | str) or isinstance(memory, bool):
        raise InvalidRequestError(f"memory is {memory!r}, give bytes as an integer, or text such as 2GiB")
    if isinstance(memory, int):
        nbytes = memory
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b?)\s*", memory.lower())
        unit = match and _UNITS.get(match[2] if match[2] in _UNITS else match[2] + "b")
        if match is None or unit is None:
            raise InvalidRequestError(f"memory is {memory!r}, write it as 512MiB or 2GiB")
        nbytes = int(Decimal(match[1]) * unit)
    if nbytes <= 0:
        raise InvalidRequestError(f"memory is {memory!r}, it must be more than 0 bytes")
    if nbytes > MAX_MEMORY:
        raise InvalidRequestError(f"memory is {memory!r}, it must be at most {MAX_MEMORY} bytes")
    return nbytes


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidRequestError(f"{name} is {value!r}, it must be one of {', '.join(choices)}")
