"""How far adapters kept in int8 are from PEFT: `python benches/bench_adapter_quality.py`.

The reference is PEFT in float32 with the file's values on the same weights; the engine gives the logits after
as many prefixes of each passage. Besides adapters that are given, random ones of some ranks on all linears.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import machine
import torch
from bench_quality import Distance, engine_logits, hf_logits, hf_model, passages
from loraserve.config import EngineConfig
from loraserve.engine.model_runner import ModelRunner
from loraserve.loader.default import default_model_path
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# (dtype, adapter_dtype)
STORAGES = (("float32", "auto"), ("float32", "int8"), ("bfloat16", "auto"), ("bfloat16", "int8"))


def random_adapter(model: PreTrainedModel, rank: int, directory: Path) -> str:
    """On all linears: A as PEFT begins with, B with a deviation of 0.02, scale 2."""
    torch.manual_seed(rank)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ALL, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    path = directory / f"random rank {rank}"
    adapted.save_pretrained(str(path))
    adapted.unload()
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=default_model_path(), help=".gguf file or directory")
    parser.add_argument("--adapters", nargs="*", default=[], help="PEFT directories")
    parser.add_argument("--ranks", nargs="*", type=int, default=[8, 16, 64], help="of random adapters")
    parser.add_argument("--passages", type=int, default=4, help="of 256 tokens each")
    args = parser.parse_args()
    print(machine.title())
    runner = ModelRunner(EngineConfig(model=str(args.model), dtype="bfloat16", memory="256MiB"))
    texts = passages(runner.model.tokenizer, args.passages)
    del runner
    model = hf_model(args.model)
    base = hf_logits(model, texts)
    print(f"{len(base)} positions")
    print("| adapter | dtype | adapters in | mean KL | same likeliest token | largest logit error | mean |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        made = [random_adapter(model, rank, Path(directory)) for rank in args.ranks]
        for path in [*args.adapters, *made]:
            adapted = PeftModel.from_pretrained(model, path).eval()
            reference = hf_logits(adapted, texts)
            adapted.unload()
            found = {("the base", "-"): base}
            for dtype, kept in STORAGES:
                config = EngineConfig(
                    model=str(args.model),
                    dtype=dtype,
                    adapter_dtype=kept,
                    quantization="none",
                    memory="512MiB",
                    device="cpu",
                )
                found[dtype, kept] = engine_logits(config, texts, path)
            for (dtype, kept), logits in found.items():
                d = Distance.of(logits, reference)
                mean = float((logits - reference).abs().mean())
                print(
                    f"| {Path(path).name} | {dtype} | {kept} | {d.kl:.6f} | {100 * d.top1:.1f}% "
                    f"| {d.max_error:.4f} | {mean:.5f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
