"""PEFT as the oracle: makes heterogeneous adapters and answers requests one at a time."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class AdapterSpec:
    """A LoraConfig in short, and how strong its random weights are."""

    name: str
    r: int
    modules: list[str]
    alpha: int = 16
    std: float = 0.02
    extra: dict[str, Any] = field(default_factory=dict)


HETEROGENEOUS = [
    AdapterSpec("r4-all", 4, ALL),
    AdapterSpec("r8-qv", 8, ["q_proj", "v_proj"], alpha=32),
    AdapterSpec("r16-rslora", 16, ALL, extra={"use_rslora": True}),
    AdapterSpec("r64-attention", 64, ["q_proj", "k_proj", "v_proj", "o_proj"], alpha=64),
    AdapterSpec(
        "patterns",
        8,
        ALL,
        extra={
            "rank_pattern": {r"layers\.[0-4]\.self_attn.q_proj": 24, "down_proj": 5},
            "alpha_pattern": {r"layers\.2\.mlp.up_proj": 48, "o_proj": 4},
        },
    ),
    AdapterSpec(
        "first-layers-mlp",
        32,
        ["gate_proj", "up_proj", "down_proj"],
        extra={"layers_to_transform": [*range(10)]},
    ),
    AdapterSpec("odd-rank-down", 5, ["down_proj"], alpha=60, std=0.05),
    AdapterSpec("gate-only", 12, ["gate_proj"], alpha=96, std=0.05),
    AdapterSpec("one-layer-o", 24, ["o_proj", "k_proj"], alpha=96, extra={"layers_to_transform": [15]}),
]


def make_adapter(base: torch.nn.Module, spec: AdapterSpec, directory: Path, seed: int) -> Path:
    """Let peft itself create and save an adapter with random, non-zero weights."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=spec.r, lora_alpha=spec.alpha, target_modules=spec.modules, task_type="CAUSAL_LM", **spec.extra
    )
    model = get_peft_model(base, config, adapter_name="default")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=spec.std)
    path = directory / spec.name
    model.save_pretrained(str(path), save_embedding_layers=False)
    model.unload()
    return path


class PeftOracle:
    """transformers + peft, one request at a time, in the base model's dtype."""

    def __init__(self, base: torch.nn.Module, adapter_paths: dict[str, str]) -> None:
        names = list(adapter_paths)
        self.model = PeftModel.from_pretrained(base, adapter_paths[names[0]], adapter_name=names[0])
        for name in names[1:]:
            self.model.load_adapter(adapter_paths[name], adapter_name=name)
        self.model.eval()

    @torch.inference_mode()
    def greedy(self, prompt: list[int], answer: list[int], adapter: str | None) -> list[int]:
        """The greedy token after the prompt and after every prefix of the answer.

        Equal to `answer` exactly when generating from the prompt gives `answer`; one forward pass
        instead of one per token.
        """
        with self._active(adapter):
            return greedy_tokens(self.model, prompt, answer)

    @torch.inference_mode()
    def last_logits(self, prompt: list[int], adapter: str | None) -> torch.Tensor:
        with self._active(adapter):
            return self.model(input_ids=torch.tensor([prompt])).logits[0, -1].float()

    def _active(self, adapter: str | None) -> Any:
        if adapter is None:
            return self.model.disable_adapter()
        self.model.set_adapter(adapter)
        return torch.no_grad()


@torch.inference_mode()
def generate_greedy(model: Any, prompt: list[int], max_new_tokens: int, **options: Any) -> list[int]:
    """The tokens behind the prompt, of the model's own `generate`."""
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def greedy_tokens(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> list[int]:
    logits = model(input_ids=torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
    return logits.argmax(-1).tolist()
