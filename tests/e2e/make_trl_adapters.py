"""Trains the adapters in `trl_adapters/` with TRL, a few steps each; needs `pip install trl`.

Run as `python -m tests.e2e.make_trl_adapters`. They are of `beside_layouts.make_base`, which tests make anew:
what TRL and PEFT write is what matters, not what was learnt.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.e2e.beside_layouts import CHATML, make_base

OUTPUT = Path(__file__).parent / "trl_adapters"
QUESTION = [{"role": "user", "content": "what is a tree?"}]
ANSWER = [{"role": "assistant", "content": "a plant with leaves"}]
CHATS = Dataset.from_list([{"messages": QUESTION + ANSWER}] * 8)
PREFERENCES = Dataset.from_list(
    [
        {
            "prompt": QUESTION,
            "chosen": ANSWER,
            "rejected": [{"role": "assistant", "content": "the moon"}],
        }
    ]
    * 8
)
TRAINING: dict[str, Any] = {
    "max_steps": 6,
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def lora(**options: Any) -> LoraConfig:
    defaults = {"r": 2, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**(defaults | options))


class Maker:
    """Trains one adapter after another on the base in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.base = directory / "base"
        self.directory = directory
        make_base(self.base)

    def tokenizer(self) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.chat_template = CHATML
        return tokenizer

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.base)

    def options(self, name: str, **options: Any) -> dict[str, Any]:
        return {"output_dir": str(self.directory / name), **TRAINING, **options}

    def sft(self, name: str, config: LoraConfig, **options: Any) -> None:
        self._sft(name, config, self.model(), self.tokenizer(), **options)

    def cloned_template(self, name: str, *, saves_modules: bool) -> None:
        """Template and tokens of another tokenizer, as `trl.clone_chat_template` brings them to the base."""
        source, tokenizer = self.directory / "template", self.tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.eos_token = "<|im_end|>"
        tokenizer.save_pretrained(source)
        model, tokenizer = self.model(), self.tokenizer()
        tokenizer.chat_template = None
        model, tokenizer, added = trl.clone_chat_template(model, tokenizer, str(source))
        saved = {"modules_to_save": ["embed_tokens", "lm_head"]}
        config = lora(**(saved if saves_modules else {"trainable_token_indices": {"embed_tokens": added}}))
        self._sft(name, config, model, tokenizer)

    def dpo(self, name: str) -> None:
        trainer = trl.DPOTrainer(
            self.model(),
            args=trl.DPOConfig(**self.options(name)),
            train_dataset=PREFERENCES,
            processing_class=self.tokenizer(),
            peft_config=lora(),
        )
        self._save(name, trainer)

    def grpo(self, name: str) -> None:
        tokenizer = self.tokenizer()
        tokenizer.padding_side = "left"
        trainer = trl.GRPOTrainer(
            self.model(),
            reward_funcs=lambda completions, **_: [float(len(str(text)) % 7) for text in completions],
            args=trl.GRPOConfig(**self.options(name, num_generations=4, max_completion_length=8)),
            train_dataset=PREFERENCES.select_columns(["prompt"]),
            processing_class=tokenizer,
            peft_config=lora(),
        )
        self._save(name, trainer)

    def reward(self, name: str) -> None:
        tokenizer = self.tokenizer()
        model = AutoModelForSequenceClassification.from_pretrained(self.base, num_labels=1)
        model.config.pad_token_id = tokenizer.pad_token_id
        trainer = trl.RewardTrainer(
            model,
            args=trl.RewardConfig(**self.options(name)),
            train_dataset=PREFERENCES,
            processing_class=tokenizer,
            peft_config=lora(task_type="SEQ_CLS"),
        )
        self._save(name, trainer)

    def _sft(self, name: str, config: LoraConfig, model: Any, tokenizer: Any, **options: Any) -> None:
        trainer = trl.SFTTrainer(
            model,
            args=trl.SFTConfig(**self.options(name, max_length=64, **options)),
            train_dataset=CHATS,
            processing_class=tokenizer,
            peft_config=config,
        )
        self._save(name, trainer)

    def _save(self, name: str, trainer: Any) -> None:
        trainer.train()
        trainer.save_model()
        written = self.directory / name
        for left_out in ("training_args.bin", "README.md"):
            (written / left_out).unlink(missing_ok=True)
        for file in written.glob("*.json"):  # which name the base as a directory of this machine
            file.write_text(file.read_text().replace(str(self.directory), "trained"))
        shutil.copytree(written, OUTPUT / name)


ADAPTERS: dict[str, Callable[[Maker, str], None]] = {
    "dpo": Maker.dpo,
    "grpo": Maker.grpo,
    "reward": Maker.reward,
    "sft": lambda maker, name: maker.sft(name, lora()),
    "sft-bias": lambda maker, name: maker.sft(name, lora(bias="lora_only", lora_bias=True)),
    "sft-cloned-template": lambda maker, name: maker.cloned_template(name, saves_modules=False),
    "sft-cloned-template-saved": lambda maker, name: maker.cloned_template(name, saves_modules=True),
    "sft-dora": lambda maker, name: maker.sft(name, lora(use_dora=True)),
    "sft-embeddings": lambda maker, name: maker.sft(name, lora(target_modules=["q_proj", "embed_tokens"])),
    "sft-eos": lambda maker, name: maker.sft(name, lora(), eos_token="<|begin|>"),
    "sft-norms": lambda maker, name: maker.sft(name, lora(modules_to_save=["norm", "input_layernorm"])),
    "sft-rslora": lambda maker, name: maker.sft(name, lora(use_rslora=True, target_modules=["q_proj"])),
}


def main() -> None:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    with tempfile.TemporaryDirectory() as directory:
        maker = Maker(Path(directory))
        for name, make in ADAPTERS.items():
            make(maker, name)
            print(f"{name} made")


if __name__ == "__main__":
    main()
