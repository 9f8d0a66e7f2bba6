"""A tiny model with adapters that classify and embed, and what transformers and PEFT have for each."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from loraserve import LLM
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification

from tests.e2e.oracle import ALL, AdapterSpec, make_adapter
from tests.models.tiny import make_model, save_model

HEADS = {"three": 3, "seven": 7, "one": 1, "several": 4}  # labels by adapter
NAMES = {"three": ["bad", "so so", "good"]}


@dataclass
class PoolingCase:
    """A model, its adapters, all of them served, and what transformers has for each."""

    path: Path
    adapters: dict[str, str]
    oracles: dict[str | None, Any] = field(default_factory=dict)
    llm: LLM = field(init=False)

    @torch.inference_mode()
    def logits(self, name: str | None, prompt: list[int]) -> npt.NDArray[np.float32]:
        """[labels]"""
        return self.oracles[name](input_ids=torch.tensor([prompt])).logits[0].numpy()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def hidden(self, name: str | None, prompt: list[int]) -> torch.Tensor:
        """[tokens, hidden]"""
        return self.oracles[name](input_ids=torch.tensor([prompt])).last_hidden_state[0]  # type: ignore[no-any-return]


def train(model: Any, task_type: str | None, path: Path, seed: int, **fields: Any) -> Any:
    """PEFT makes and saves an adapter; the model with it."""
    torch.manual_seed(seed)
    peft = get_peft_model(model, LoraConfig(task_type=task_type, target_modules=ALL, r=6, **fields))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "score" in name and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    peft.save_pretrained(str(path))
    return peft.eval()


def classifier(path: Path, num_labels: int) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=num_labels)
    model.config.pad_token_id = 0
    return model


def make_files(name: str, directory: Path) -> PoolingCase:
    """The model and its adapters, not served."""
    path = save_model(make_model(name), directory / "model")
    plain = make_adapter(make_model(name), AdapterSpec("plain", 8, ALL), directory, 9)
    case = PoolingCase(path, {"plain": str(plain)})
    for seed, (adapter, num_labels) in enumerate(HEADS.items()):
        case.adapters[adapter] = str(directory / adapter)
        case.oracles[adapter] = train(
            classifier(path, num_labels), "SEQ_CLS", directory / adapter, seed, use_rslora=adapter == "seven"
        )
    labels = {str(index): label for index, label in enumerate(NAMES["three"])}
    (directory / "three" / "config.json").write_text(json.dumps({"id2label": labels}))
    problem = {"problem_type": "multi_label_classification"}
    (directory / "several" / "config.json").write_text(json.dumps(problem))
    case.adapters["embedder"] = str(directory / "embedder")
    case.oracles["embedder"] = train(
        AutoModel.from_pretrained(path), "FEATURE_EXTRACTION", directory / "embedder", 77
    )
    case.oracles[None] = AutoModel.from_pretrained(path).eval()
    return case


def make_case(name: str, directory: Path, **settings: Any) -> PoolingCase:
    """Served, in steps shorter than some prompts."""
    case = make_files(name, directory)
    settings = {"dtype": "float32", "memory": "16MiB", "max_batched_tokens": 48} | settings
    case.llm = LLM(str(case.path), case.adapters, **settings)
    return case
