"""OpenVINO GenAI: continuous batching; adapters switch between calls, so each adapter's requests are a batch.

Measured and not used: `MODE_STATIC` and `MODE_FUSE` are faster with one adapter, but fix it when the
pipeline is built; float32 and smaller batches were slower, a bfloat16 cache the same.
"""

import importlib.metadata
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
from driver import Job, serve
from precisions import Precision

CACHE_GIB = 2
MAX_BATCHED_TOKENS = 4096  # the prompts of the whole workload in one step
MAX_SEQS = 32
HINTS = {"bfloat16": "bf16", "float32": "f32"}
GROUP_SIZE = 64  # the largest that divides the model's rows of 576 and 1,536; 128 leaves those of 576 at int8
LORA_SCALE = 2.0  # GenAI's alpha is lora_alpha / r


class OpenVino:
    def __init__(self, job: Job) -> None:
        self.engine = f"OpenVINO GenAI {importlib.metadata.version('openvino-genai')}"
        self.settings: dict[str, object] = {
            "INFERENCE_PRECISION_HINT": HINTS[job.precision.dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": job.threads,
        }
        self._job = job
        self._adapters = [
            genai.Adapter(str(job.data / f"adapters/adapter-{i}/adapter_model.safetensors"))
            for i in range(job.distinct)
        ]
        properties = dict(self.settings)
        if self._adapters:
            scaled = [(adapter, LORA_SCALE) for adapter in self._adapters]
            properties["adapters"] = genai.AdapterConfig(scaled, genai.AdapterConfig.Mode.MODE_DYNAMIC)
        self._pipe = genai.ContinuousBatchingPipeline(
            str(model_path(job)), scheduler_config(), "CPU", properties
        )

    def batch(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        groups: dict[int | None, list[ov.Tensor]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault(self._job.adapter_of(index), []).append(ids(prompt))
        counts = []
        for adapter, inputs in groups.items():
            results = self._pipe.generate(inputs, [self._params(adapter, new_tokens)] * len(inputs))
            counts += [len(result.m_generation_ids[0]) for result in results]
        return counts

    def stream(self, prompt: list[int], new_tokens: int) -> list[float]:
        clock = Clock()
        self._pipe.generate([ids(prompt)], [self._params(None, new_tokens)], clock)
        return clock.times

    def close(self) -> None:
        pass

    def _params(self, adapter: int | None, new_tokens: int) -> genai.GenerationConfig:
        params = genai.GenerationConfig()
        params.max_new_tokens = new_tokens
        params.ignore_eos = True
        params.do_sample = False
        if self._adapters:
            used = [] if adapter is None else [(self._adapters[adapter], LORA_SCALE)]
            params.adapters = genai.AdapterConfig(used)
        return params


class Clock(genai.StreamerBase):  # type: ignore[misc]
    """Notes when each token comes."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, token: int | list[int]) -> genai.StreamingStatus:
        self.times += [time.perf_counter()] * (1 if isinstance(token, int) else len(token))
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def scheduler_config() -> genai.SchedulerConfig:
    config = genai.SchedulerConfig()
    config.cache_size = CACHE_GIB
    config.max_num_seqs = MAX_SEQS
    config.max_num_batched_tokens = MAX_BATCHED_TOKENS
    config.enable_prefix_caching = False
    return config


def ids(prompt: list[int]) -> ov.Tensor:
    return ov.Tensor(np.array([prompt], dtype=np.int64))


def model_path(job: Job) -> Path:
    return job.work / f"openvino-{job.precision.quantization or 'bf16'}"


def convert(job: Job) -> None:
    """Export the checkpoint with optimum-intel, once; dense weights stay bfloat16 in the file."""
    path = model_path(job)
    if path.is_dir():
        return
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    optimum = Path(sys.executable).with_name("optimum-cli")
    command = [optimum, "export", "openvino", "--model", job.data / "model"]
    command += ["--task", "text-generation-with-past", *weight_format(job.precision), partial]
    subprocess.run([str(part) for part in command], check=True)
    partial.rename(path)


def weight_format(precision: Precision) -> list[str | int]:
    """int8 has a scale a row, int4 one a group; embedding and head are int8 in both."""
    if precision.quantization is None:
        return []
    groups = ["--group-size", GROUP_SIZE, "--sym", "--ratio", 1.0] if precision.quantization == "int4" else []
    return ["--weight-format", precision.quantization, *groups]


if __name__ == "__main__":
    serve(OpenVino, convert)
