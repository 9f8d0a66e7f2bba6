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

sys.path.append(str(Path(__file__).parent / "peers"))  # which is no package
from precisions import PRECISIONS, Precision

__all__ = ["PRECISIONS", "BenchEngine", "BenchFiles", "Loraserve", "PeerEngine", "Precision", "Transformers"]

DEFAULT_VENVS = Path("~/.cache/loraserve-bench/peers")
RANK = 16
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class BenchFiles:
    """The checkpoint and the adapters that all engines read, beside the peers' environments in `venvs`."""

    venvs: Path
    rank: int

    def __post_init__(self) -> None:
        self.venvs.mkdir(parents=True, exist_ok=True)

    @cached_property
    def data(self) -> Path:
        from checkpoint import prepare  # noqa: PLC0415

        data: Path = prepare(self.venvs / "data", self.rank)
        return data

    @property
    def model(self) -> Path:
        return self.data / "model"

    def gguf(self, gguf_type: str) -> Path:
        """The file that llama.cpp gets, made if there is none yet."""
        import gguf_models  # noqa: PLC0415

        path: Path = gguf_models.ensure(self.data, gguf_type, self.venvs)
        return path

    def llama_cpp_logits(self, gguf_type: str, texts: list[list[int]], step: int) -> torch.Tensor:
        """After each `step` tokens of each text: [positions, vocabulary]."""
        import llama_logits  # noqa: PLC0415

        rows: torch.Tensor = llama_logits.logits(self.data, gguf_type, texts, step, self.venvs)
        return rows

    def adapters(self, count: int) -> dict[str, str]:
        return {f"adapter-{i}": str(self.data / f"adapters/adapter-{i}") for i in range(count)}


class BenchEngine(Protocol):
    name: str
    settings: dict[str, Any]

    def batch(self) -> float:
        """Answer the whole workload once; output tokens per second, prompt time included."""
        ...

    def stream(self) -> float:
        """Answer the first prompt alone, on the base model; milliseconds between its tokens."""
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
            self._answer(self._prompts, self._adapters, WARM_UP_TOKENS)
            self._is_warm = True
        elapsed = self._seconds(self._prompts, self._adapters, self._workload.new_tokens)
        return self._workload.num_requests * self._workload.new_tokens / elapsed

    def stream(self) -> float:
        """The mean over the answer, from what it takes beyond an answer of one token."""
        new_tokens = self._workload.new_tokens
        first, whole = (self._seconds(self._prompts[:1], [None], count) for count in (1, new_tokens))
        return 1e3 * (whole - first) / (new_tokens - 1)

    def _seconds(self, prompts: list[list[int]], adapters: list[str | None], new_tokens: int) -> float:
        start = time.perf_counter()
        self._answer(prompts, adapters, new_tokens)
        return time.perf_counter() - start

    @abstractmethod
    def _answer(self, prompts: list[list[int]], adapters: list[str | None], new_tokens: int) -> None:
        """Answer every prompt with `new_tokens` tokens; one adapter or None for each."""


class Loraserve(InProcess):
    """On the checkpoint, quantised at load if the precision is, or (`from_file`) on llama.cpp's own file."""

    name = "loraserve"

    def __init__(
        self,
        files: BenchFiles,
        workload: Workload,
        distinct: int,
        precision: Precision,
        from_file: bool = False,
    ) -> None:
        super().__init__(workload, distinct)
        adapters = files.adapters(distinct)
        self.settings = {"dtype": precision.dtype, "memory": "2GiB", "prefix_caching": False}
        model = files.model
        if from_file:
            model = files.gguf(precision.gguf)
            self.name = f"{Loraserve.name}, {precision.gguf} file"
        elif precision.is_quantized:
            self.settings["quantization"] = precision.quantization
            self.name = f"{Loraserve.name}, {precision.quantization}"
        self._llm = LLM(str(model), adapters, **self.settings)

    def _answer(self, prompts: list[list[int]], adapters: list[str | None], new_tokens: int) -> None:
        outputs = self._llm.generate(prompts, greedy(new_tokens), adapters, progress=False)
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

    @torch.inference_mode()
    def _answer(self, prompts: list[list[int]], adapters: list[str | None], new_tokens: int) -> None:
        ids = torch.tensor(prompts)
        output = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            **({} if adapters[0] is None else {"adapter_names": adapters}),
        )
        if output.shape[1] != ids.shape[1] + new_tokens:
            raise RuntimeError(f"transformers answered {output.shape[1] - ids.shape[1]} tokens")

    def close(self) -> None:
        self._model = None


class PeerEngine:
    """A peer's driver; see peers/driver.py. It reads the default offline workload from a file of its own."""

    def __init__(
        self, files: BenchFiles, peer: str, distinct: int, threads: int, precision: Precision
    ) -> None:
        from environments import PEERS as known  # noqa: PLC0415, N811
        from environments import ensure_environment  # noqa: PLC0415
        from process import PeerJob, PeerProcess  # noqa: PLC0415

        if peer not in known:
            raise SystemExit(f"error: peer is {peer!r}, known are {', '.join(known)}")
        if precision.is_quantized and known[peer].is_dense_only:
            raise RuntimeError(f"the driver of {peer} has no quantised weights")
        python = ensure_environment(known[peer], files.venvs)
        if known[peer].reads_gguf:
            files.gguf(precision.gguf)
        job = PeerJob(distinct, threads, precision)
        self._process = PeerProcess(known[peer], python, files.data, job)
        self.name: str = self._process.hello["engine"]
        self.settings: dict[str, Any] = self._process.hello["settings"]

    def batch(self) -> float:
        rate: float = self._process.run("batch")["output_tokens_per_s"]
        return rate

    def stream(self) -> float:
        """The median of the times between tokens."""
        milliseconds: float = self._process.run("stream")["inter_token_ms"]
        return milliseconds

    def close(self) -> None:
        self._process.close()
