"""`Contained`: LoRA weights taken out of another container, by module, as PEFT would hold them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraserve.errors import AdapterFormatError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Module:
    """A [rank, in_features], B [out_features, rank]; scaled by alpha / rank."""

    a: Tensor
    b: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.a.shape[0])


@dataclass
class Contained:
    """Modules by their paths in a plain causal language model (`model.layers.0.self_attn.q_proj`)."""

    modules: dict[str, Module] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    more_config: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Under PEFT's names."""
        named = {}
        for path, module in self.modules.items():
            named[f"base_model.model.{path}.lora_A.weight"] = module.a
            named[f"base_model.model.{path}.lora_B.weight"] = module.b
        return named

    def config(self) -> dict[str, Any]:
        """What PEFT's adapter_config.json would say of it. Raises AdapterFormatError: there is no module."""
        if not self.modules:
            raise AdapterFormatError("there is no module in it: the adapter would do nothing")
        rank = Counter(module.rank for module in self.modules.values()).most_common(1)[0][0]
        alpha = Counter(module.alpha for module in self.modules.values()).most_common(1)[0][0]
        return {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": list(self.modules),
            "rank_pattern": {path: one.rank for path, one in self.modules.items() if one.rank != rank},
            "alpha_pattern": {path: one.alpha for path, one in self.modules.items() if one.alpha != alpha},
            **self.more_config,
        }
