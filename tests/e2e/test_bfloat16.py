"""bfloat16: no further from float32 than twice what PEFT in bfloat16 is."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from loraserve import _core
from loraserve.config import BLOCK_SIZE, EngineConfig
from loraserve.engine.model_runner import ModelRunner
from loraserve.loader.base_weights import BaseWeights
from transformers import AutoModelForCausalLM

from tests.e2e.oracle import HETEROGENEOUS, PeftOracle
from tests.e2e.prompts import PROMPTS
from tests.models.tiny import make_model, save_model


def our_last_logits(
    config: EngineConfig, requests: list[tuple[list[int], str | None]], paths: dict[str, str]
) -> torch.Tensor:
    """Logits after each prompt, all prompts in one mixed batch: [requests, vocab]."""
    runner = ModelRunner(config)
    scheduler = _core.Scheduler(
        num_pages=runner.num_pages,
        page_nbytes=runner.page_nbytes,
        block_size=BLOCK_SIZE,
        max_num_seqs=64,
        max_batched_tokens=4096,
        max_model_len=2048,
    )
    sources = {}
    base_weights = BaseWeights(runner.model.path, config.dtype)
    for name, path in paths.items():
        receipt = _core.check_adapter(
            path, runner.base_shape, config.dtype, config.max_lora_rank, base_weights=base_weights
        )
        sources[scheduler.register_adapter(name, receipt.hash, receipt.extent_nbytes)] = (path, receipt)
    ids = [scheduler.submit(p, [(a, 1.0)] if a else [], 1, 0, []) for p, a in requests]
    rows: dict[int, torch.Tensor] = {}
    while len(rows) < len(ids):
        step = scheduler.schedule()
        for adapter_id, slot, first_page, num_pages in step.loads:
            path, receipt = sources[adapter_id]
            extent = runner.extent(slot, first_page, num_pages)
            load = partial(
                _core.load_adapter,
                path,
                runner.base_shape,
                config.dtype,
                config.max_lora_rank,
                receipt.hash,
                base_linears=runner.backend.base_linears,
                known=receipt,
            )
            runner.bind(extent, runner.backend.fill(extent, load, receipt.nbytes))
            scheduler.adapter_loaded(adapter_id)
        if step.batch is not None:
            logits = runner.execute(step.batch)
            rows.update(zip(step.batch.sample_request_ids, logits.clone(), strict=True))
            scheduler.commit(step, logits.numpy().argmax(-1).astype("int32"))
    runner.release()
    return torch.stack([rows[request_id] for request_id in ids])


def test_logit_error_is_at_most_twice_pefts(
    smollm2_path: str, adapter_paths: dict[str, str], peft_oracle: PeftOracle, hf_smollm2: Any
) -> None:
    base, tokenizer = hf_smollm2
    names = [None, *(spec.name for spec in HETEROGENEOUS)]
    requests = [(tokenizer(text)["input_ids"], names[i % len(names)]) for i, text in enumerate(PROMPTS)]
    exact = torch.stack([peft_oracle.last_logits(prompt, name) for prompt, name in requests])

    copy = AutoModelForCausalLM.from_config(base.config, dtype=torch.float32)
    weights = {name: tensor for name, tensor in peft_oracle.model.get_base_model().state_dict().items()}
    copy.load_state_dict({n.replace(".base_layer", ""): t for n, t in weights.items() if "lora_" not in n})
    peft_bf16 = PeftOracle(copy.to(torch.bfloat16), adapter_paths)
    peft_error = max_error(torch.stack([peft_bf16.last_logits(p, n) for p, n in requests]), exact)

    for num_ranks in (1, 3):
        config = EngineConfig(
            model=smollm2_path,
            dtype="bfloat16",
            quantization="none",
            memory="512MiB",
            tensor_parallel_size=num_ranks,
        )
        our_error = max_error(our_last_logits(config, requests, adapter_paths), exact)
        print(f"max logit error of {num_ranks} ranks: ours {our_error:.4f}, PEFT bfloat16 {peft_error:.4f}")
        assert 0 < our_error <= 2 * peft_error


def test_a_residual_keeps_what_bfloat16_would_round_away(tmp_path: Path) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(256.0)  # what layers add is then below its last place
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    prompts = [list(range(first, first + 12)) for first in range(3, 180, 12)]
    with torch.inference_mode():
        exact = torch.stack([model(torch.tensor([p])).logits[0, -1] for p in prompts])
    config = EngineConfig(model=str(save_model(model, tmp_path)), dtype="bfloat16", memory="16MiB")
    ours = our_last_logits(config, [(prompt, None) for prompt in prompts], {})
    with torch.inference_mode():
        copy = model.to(torch.bfloat16)
        rounded = torch.stack([copy(torch.tensor([p])).logits[0, -1].float() for p in prompts])
    assert max_error(ours, exact) < 0.5 * max_error(rounded, exact)


def max_error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return float((logits - exact).abs().max())
