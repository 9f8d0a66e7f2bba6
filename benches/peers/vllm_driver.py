"""vLLM's CPU backend, in process through `LLM`: one batch of all requests, adapters mixed in it."""

import os
import time
from typing import Any

from driver import Job, serve

CACHE_GIB = 2
MAX_LEN = 256
MAX_BATCHED_TOKENS = 4096  # the prompts of the whole workload in one step
MAX_SEQS = 32
MAX_RANK = 16


class Vllm:
    def __init__(self, job: Job) -> None:
        # Read when vllm is imported.
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(CACHE_GIB)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{job.threads - 1}"
        os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        import vllm  # noqa: PLC0415
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        self._sampling_params, self._lora_request = vllm.SamplingParams, LoRARequest
        self._job = job
        self.engine = f"vLLM {vllm.__version__} CPU"
        self.settings: dict[str, object] = {
            "dtype": job.precision.dtype,
            "max_model_len": MAX_LEN,
            "max_num_seqs": MAX_SEQS,
            "max_num_batched_tokens": MAX_BATCHED_TOKENS,
            "enable_prefix_caching": False,
        }
        if job.distinct:
            self.settings |= {"enable_lora": True, "max_loras": job.distinct, "max_lora_rank": MAX_RANK}
        self._llm = vllm.LLM(model=str(job.data / "model"), **self.settings)

    def batch(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        adapters = [self._adapter(self._job.adapter_of(index)) for index in range(len(prompts))]
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            self._params(new_tokens),
            lora_request=adapters if self._job.distinct else None,
            use_tqdm=False,
        )
        return [len(output.outputs[0].token_ids) for output in outputs]

    def stream(self, prompt: list[int], new_tokens: int) -> list[float]:
        engine = self._llm.llm_engine
        engine.add_request("stream", {"prompt_token_ids": prompt}, self._params(new_tokens))
        times: list[float] = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                new = len(output.outputs[0].token_ids) - len(times)
                times += [time.perf_counter()] * new
        return times

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _params(self, new_tokens: int) -> Any:
        return self._sampling_params(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)

    def _adapter(self, index: int | None) -> Any:
        if index is None:
            return None
        path = str(self._job.data / f"adapters/adapter-{index}")
        return self._lora_request(f"adapter-{index}", index + 1, path)


if __name__ == "__main__":
    serve(Vllm)
