"""A tiny model with its adapters, as served and as PEFT computes them."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from loraserve import LLM
from peft import PeftModel

from tests.e2e.oracle import greedy_tokens


@dataclass(frozen=True)
class Case:
    """A model, its adapters by name, and all of them served."""

    base: torch.nn.Module
    path: Path
    adapters: dict[str, str]
    llm: LLM

    def peft_greedy(self, prompt: list[int], answer: list[int], adapter: str | None) -> list[int]:
        """PEFT loads what an adapter replaces into the base it is given: each has a copy."""
        model = self.base_for(adapter)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, self.adapters[adapter]).eval()
        with torch.inference_mode():
            return greedy_tokens(model, prompt, answer)

    def base_for(self, adapter: str | None) -> torch.nn.Module:
        """A copy that the adapter can be loaded into."""
        return copy.deepcopy(self.base)
