"""A tiny model with its adapters, as served and as PEFT computes them."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from loraserve import LLM, SamplingParams
from peft import PeftModel

from tests.e2e.oracle import greedy_tokens


@dataclass(frozen=True)
class Case:
    """A model, its adapters by name, and all of them served."""

    base: torch.nn.Module
    path: Path
    adapters: dict[str, str]
    llm: LLM

    def check_mixed_batch(self, prompt: list[int], greedy: SamplingParams) -> None:
        """One batch of all adapters and the base gives PEFT's tokens, of each its own."""
        names = [None, *self.adapters, None]
        outputs = self.llm.generate([prompt] * len(names), greedy, names)
        answers = [output.token_ids for output in outputs]
        assert answers == [
            self.peft_greedy(prompt, answer, name) for name, answer in zip(names, answers, strict=True)
        ]
        assert len({tuple(answer) for answer in answers}) == len(self.adapters) + 1

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
