"""What the offline workload runs on: loraserve, transformers with PEFT, and peers in their own processes."""

import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import peft
import torch
import transformers
from loraserve import LLM
from peft import PeftModel
from streams import greedy
from transformers import AutoModelForCausalLM
from workloads import Workload

PEERS = Path(__file__).parent / "peers"
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class BenchFiles:
    """The checkpoint and the adapters that all engines read, beside the peers' environments in `venvs`."""

    venvs: Path
    rank: int

    def __post_init__(self) -> None:
        sys.path.insert(0, str(PEERS))  # the peers' folder is no package
        self.venvs.mkdir(parents=True, exist_ok=True)

    @cached_property
    def data(self) -> Path:
        from checkpoint import prepare  # noqa: PLC0415

        data: Path = prepare(self.venvs / "data", self.rank)
        return data

    @property
    def model(self) -> Path:
        return self.data / "model"

    def adapters(self, count: int) -> dict[str, str]:
        return {f"adapter-{i}": str(self.data / f"adapters/adapter-{i}") for i in range(count)}


class BenchEngine(Protocol):
    name: str
    settings: dict[str, Any]

    def batch(self) -> float:
        """Answer the whole workload once; output tokens per second, prompt time included."""
        ...

    def close(self) -> None: ...


class InProcess(ABC):
    """Times a subclass's `_answer`; the first call warms up."""

    name: str
    settings: dict[str, Any]

    def __init__(self, workload: Workload, distinct: int) -> None:
        self._workload = workload
        self._prompts = workload.prompts()
        self._adapters = workload.adapters(distinct)
        self._is_warm = False

    def batch(self) -> float:
        if not self._is_warm:
            self._answer(WARM_UP_TOKENS)
            self._is_warm = True
        start = time.perf_counter()
        self._answer(self._workload.new_tokens)
        elapsed = time.perf_counter() - start
        return self._workload.num_requests * self._workload.new_tokens / elapsed

    @abstractmethod
    def _answer(self, new_tokens: int) -> None:
        """Answer every prompt with `new_tokens` tokens."""


class Loraserve(InProcess):
    name = "loraserve"

    def __init__(self, files: BenchFiles, workload: Workload, distinct: int, dtype: str) -> None:
        super().__init__(workload, distinct)
        adapters = files.adapters(distinct)
        self.settings = {"dtype": dtype, "memory": "2GiB", "prefix_caching": False}
        self._llm = LLM(str(files.model), adapters, **self.settings)

    def _answer(self, new_tokens: int) -> None:
        outputs = self._llm.generate(self._prompts, greedy(new_tokens), self._adapters, progress=False)
        if any(len(output.token_ids) != new_tokens for output in outputs):
            raise RuntimeError(f"an answer of loraserve has not {new_tokens} tokens")

    def close(self) -> None:
        self._llm.close()


class Transformers(InProcess):
    """`generate` on a static batch; adapters mixed in the batch through PEFT's `adapter_names`.

    Without adapters the model runs without PEFT's wrappers: its best case.
    """

    name = "transformers + PEFT"

    def __init__(self, files: BenchFiles, workload: Workload, distinct: int, dtype: str) -> None:
        super().__init__(workload, distinct)
        versions = {"transformers": transformers.__version__, "peft": peft.__version__}
        self.settings = {"dtype": dtype, **versions}
        self._model: Any = AutoModelForCausalLM.from_pretrained(files.model, dtype=getattr(torch, dtype))
        for index, (name, adapter) in enumerate(files.adapters(distinct).items()):
            if index == 0:
                self._model = PeftModel.from_pretrained(self._model, adapter, adapter_name=name)
            else:
                self._model.load_adapter(adapter, adapter_name=name)
        self._model.eval()
        self._settings: dict[str, Any] = {"adapter_names": self._adapters} if distinct else {}

    @torch.inference_mode()
    def _answer(self, new_tokens: int) -> None:
        ids = torch.tensor(self._prompts)
        output = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            **self._settings,
        )
        if output.shape[1] != ids.shape[1] + new_tokens:
            raise RuntimeError(f"transformers answered {output.shape[1] - ids.shape[1]} tokens")

    def close(self) -> None:
        self._model = None


class PeerEngine:
    """A peer's driver; see peers/driver.py. It reads the default offline workload from a file of its own."""

    def __init__(self, files: BenchFiles, peer: str, distinct: int, threads: int) -> None:
        from environments import PEERS as known  # noqa: PLC0415, N811
        from environments import ensure_environment  # noqa: PLC0415
        from process import PeerProcess  # noqa: PLC0415

        if peer not in known:
            raise SystemExit(f"error: peer is {peer!r}, known are {', '.join(known)}")
        python = ensure_environment(known[peer], files.venvs)
        self._process = PeerProcess(known[peer], python, files.data, distinct, threads)
        self.name: str = self._process.hello["engine"]
        self.settings: dict[str, Any] = self._process.hello["settings"]

    def batch(self) -> float:
        rate: float = self._process.run("batch")["output_tokens_per_s"]
        return rate

    def close(self) -> None:
        self._process.close()
