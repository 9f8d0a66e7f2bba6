"""What the benchmark runs: loraserve, and transformers with PEFT as the baseline."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from loraserve import LLM, SamplingParams
from loraserve.loader.default import default_model_path
from peft import PeftModel
from transformers import AutoModelForCausalLM


class BenchEngine(Protocol):
    name: str

    def run(self, prompts: list[list[int]], adapters: Sequence[str | None], new_tokens: int) -> None:
        """Answer all prompts with `new_tokens` greedy tokens each."""
        ...


class Loraserve:
    name = "loraserve"

    def __init__(self, adapters: Mapping[str, str], dtype: str) -> None:
        self._llm = LLM("smollm2", adapters, dtype=dtype, memory="2GiB", prefix_caching=False)

    def run(self, prompts: list[list[int]], adapters: Sequence[str | None], new_tokens: int) -> None:
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        outputs = self._llm.generate(prompts, params, list(adapters), progress=False)
        assert all(len(output.token_ids) == new_tokens for output in outputs)


class Transformers:
    """`generate` on a static batch; adapters mixed in the batch through PEFT's `adapter_names`."""

    name = "transformers + PEFT"

    def __init__(self, adapters: Mapping[str, str], dtype: str) -> None:
        path = Path(default_model_path())
        os.environ["TQDM_DISABLE"] = "1"
        self._base = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=getattr(torch, dtype)
        ).eval()
        self._peft: Any = None
        for name, adapter_path in adapters.items():
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self._base, adapter_path, adapter_name=name)
            else:
                self._peft.load_adapter(adapter_path, adapter_name=name)

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], adapters: Sequence[str | None], new_tokens: int) -> None:
        ids = torch.tensor(prompts)
        settings = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": new_tokens,
            "min_new_tokens": new_tokens,
            "do_sample": False,
            "pad_token_id": 0,
        }
        if all(name is None for name in adapters):
            output = self._generate_base(settings)
        else:
            output = self._peft.eval().generate(**settings, adapter_names=[n or "__base__" for n in adapters])
        assert output.shape[1] == ids.shape[1] + new_tokens

    def _generate_base(self, settings: dict[str, Any]) -> torch.Tensor:
        if self._peft is None:
            return self._base.generate(**settings)
        with self._peft.disable_adapter():
            return self._peft.generate(**settings)
