"""How far each storage is from float32, on English text: `python benches/bench_quality.py`.

The reference is transformers in float32 on the same weights, dequantised where the file is quantised; the
engine gives the logits after as many prefixes of each passage. Text: the reference that Python ships.

With --gguf the model is the bfloat16 checkpoint of `bench_serving.py offline`, and llama.cpp's files of it
run in llama.cpp and in loraserve. The reference is the checkpoint in float32: what file and engine lose.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics  # type: ignore[import-not-found]
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import machine
import torch
from engines import DEFAULT_VENVS, RANK, BenchFiles
from loraserve import _core
from loraserve.config import BLOCK_SIZE, EngineConfig
from loraserve.engine.model_runner import ModelRunner
from loraserve.loader.default import default_model_path
from loraserve.loader.gguf_file import GgufFile
from loraserve.text.tokenizer import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

PASSAGE_TOKENS = 256
STEP = 8  # tokens between two prefixes
LIKELY = math.log(1e-6)
# As EngineConfig takes them; of a .gguf file "file" is what it has.
STORAGES: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32", "quantization": "none"},
    "bfloat16": {"dtype": "bfloat16", "quantization": "none"},
    "file": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}


@dataclass(frozen=True)
class Distance:
    """Of some logits [positions, vocabulary] from the reference's."""

    kl: float  # mean Kullback-Leibler divergence, in nats
    kl_p99: float
    top1: float  # share of positions with the same likeliest token
    max_error: float  # of a logarithm of a probability above 1e-6

    @classmethod
    def of(cls, logits: torch.Tensor, reference: torch.Tensor) -> Distance:
        expected, found = reference.log_softmax(-1), logits.float().log_softmax(-1)
        kl = (expected.exp() * (expected - found)).sum(-1)
        same = reference.argmax(-1) == logits.argmax(-1)
        return cls(
            kl=float(kl.mean()),
            kl_p99=float(kl.quantile(0.99)),
            top1=float(same.float().mean()),
            max_error=float((found - expected)[expected > LIKELY].abs().max()),
        )


def passages(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """`PASSAGE_TOKENS` tokens each, from places drawn once."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    draw = random.Random(0)
    starts = (draw.randrange(len(text) - 8 * PASSAGE_TOKENS) for _ in range(count))
    return [tokenizer.encode(text[at : at + 8 * PASSAGE_TOKENS])[:PASSAGE_TOKENS] for at in starts]


def hf_model(path: Path) -> PreTrainedModel:
    """transformers' model of a .gguf file's or a directory's weights, in float32."""
    if path.is_dir():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with GgufFile(path) as gguf:
        config = AutoConfig.for_model(**(gguf.raw_config | {"model_type": "llama", "hidden_act": "silu"}))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict({name: gguf.tensor(name) for name in gguf.names()}, strict=False)
        model.tie_weights()
    return model


@torch.inference_mode()
def hf_logits(model: PreTrainedModel, texts: list[list[int]]) -> torch.Tensor:
    """After each prefix: [positions, vocabulary]."""
    rows = [model(torch.tensor([text])).logits[0, STEP - 1 :: STEP].float() for text in texts]
    return torch.cat(rows)


def engine_logits(config: EngineConfig, texts: list[list[int]], adapter: str | None = None) -> torch.Tensor:
    """As `hf_logits`, of the engine's step; blocks that prefixes share are computed once.

    `adapter`: the directory of one that changes linears only.
    """
    runner = ModelRunner(config)
    limits = (config.dtype, config.max_lora_rank)
    scheduler = _core.Scheduler(
        num_pages=runner.num_pages,
        page_nbytes=runner.page_nbytes,
        block_size=BLOCK_SIZE,
        max_num_seqs=64,
        max_batched_tokens=2048,
        max_model_len=2048,
    )
    wanted: list[tuple[str, float]] = []
    if adapter is not None:
        receipt = _core.check_adapter(adapter, runner.base_shape, *limits, adapter_dtype=config.adapter_dtype)
        scheduler.register_adapter("adapter", receipt.hash, receipt.nbytes)
        wanted = [("adapter", 1.0)]

    def load(address: int, nbytes: int) -> _core.AdapterLayout:
        assert adapter is not None, "invariant: only a registered adapter is loaded"
        return _core.load_adapter(
            adapter,
            runner.base_shape,
            *limits,
            receipt.hash,
            address,
            nbytes,
            adapter_dtype=config.adapter_dtype,
        )

    order: list[int] = []
    rows: dict[int, torch.Tensor] = {}
    for text in texts:
        prefixes = [text[:end] for end in range(STEP, len(text) + 1, STEP)]
        order += (ids := [scheduler.submit(prefix, wanted, 1, 0, []) for prefix in prefixes])
        while not all(request_id in rows for request_id in ids):
            step = scheduler.schedule()
            for adapter_id, slot, first_page, num_pages in step.loads:
                extent = runner.extent(slot, first_page, num_pages)
                runner.bind(extent, runner.backend.fill(extent, partial(load, nbytes=extent.nbytes)))
                scheduler.adapter_loaded(adapter_id)
            if step.batch is None:
                assert step.loads, "invariant: there is room for one passage"
                continue
            logits = runner.execute(step.batch)
            rows.update(zip(step.batch.sample_request_ids, logits.clone(), strict=True))
            scheduler.commit(step, logits.numpy().argmax(-1).astype("int32"))
    return torch.stack([rows[request_id] for request_id in order])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=default_model_path(), help=".gguf file or directory")
    parser.add_argument("--passages", type=int, default=24, help=f"of {PASSAGE_TOKENS} tokens each")
    parser.add_argument(
        "--storages", nargs="+", choices=STORAGES, help="default: all that the model can have"
    )
    parser.add_argument(
        "--gguf", nargs="+", metavar="TYPE", help="beside llama.cpp, such as BF16 Q8_0 Q4_0 Q4_K_M"
    )
    parser.add_argument("--venvs", type=Path, default=DEFAULT_VENVS, help="keeps llama.cpp and its files")
    parser.add_argument(
        "--json", type=Path, help="write the results there; {machine} stands for this machine"
    )
    args = parser.parse_args()
    print(machine.title())
    files = BenchFiles(args.venvs.expanduser(), RANK)
    if args.gguf:
        args.model = files.model
    runner = ModelRunner(EngineConfig(model=str(args.model), dtype="bfloat16", memory="256MiB"))
    texts = passages(runner.model.tokenizer, args.passages)
    del runner
    model = hf_model(args.model)
    reference = hf_logits(model, texts)
    distances = {"transformers bfloat16": Distance.of(hf_logits(model.to(torch.bfloat16), texts), reference)}
    del model
    can_have = ("float32", "bfloat16", *(("int8", "int4") if args.model.is_dir() else ("file",)))
    for name in args.storages or can_have:
        config = EngineConfig(model=str(args.model), memory="512MiB", **STORAGES[name])
        distances[f"loraserve, {name}"] = Distance.of(engine_logits(config, texts), reference)
    for gguf_type in args.gguf or ():
        dtype = "float32" if gguf_type == "F32" else "bfloat16"
        config = EngineConfig(model=str(files.gguf(gguf_type)), memory="512MiB", dtype=dtype)
        distances[f"loraserve, {gguf_type} file"] = Distance.of(engine_logits(config, texts), reference)
        found = files.llama_cpp_logits(gguf_type, texts, STEP)
        distances[f"llama.cpp, {gguf_type} file"] = Distance.of(found, reference)
    print(f"{len(reference)} positions")
    print("| weights | mean KL | 99th percentile | same likeliest token | largest error |")
    print("|---|---|---|---|---|")
    for name, d in distances.items():
        print(f"| {name} | {d.kl:.5f} | {d.kl_p99:.4f} | {100 * d.top1:.1f}% | {d.max_error:.3f} |")
    if args.json:
        results = {name: vars(distance) for name, distance in distances.items()}
        document = {"machine": machine.describe(), "positions": len(reference), "quality": results}
        path = Path(str(args.json).replace("{machine}", machine.slug()))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
