"""Which architectures the decoder can run, and what sets each apart from plain Llama."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraserve.errors import ModelError


@dataclass(frozen=True)
class Architecture:
    """The switches of one `architectures` entry; `None` means the model's config decides."""

    qkv_bias: bool | None
    o_bias: bool | None
    mlp_bias: bool | None
    qk_norm: bool


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(qkv_bias=None, o_bias=None, mlp_bias=None, qk_norm=False),
    "MistralForCausalLM": Architecture(qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, o_bias=False, mlp_bias=False, qk_norm=False),
    "Qwen3ForCausalLM": Architecture(qkv_bias=None, o_bias=None, mlp_bias=False, qk_norm=True),
}


def find_architecture(config: Mapping[str, Any]) -> tuple[str, Architecture]:
    """Pick the architecture a config.json names. Raises ModelError if there is none we can run."""
    names = config.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    found = ", ".join(map(str, names)) or "none"
    raise ModelError(f"architecture {found} is not supported, supported are {', '.join(ARCHITECTURES)}")
