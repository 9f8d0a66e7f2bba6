"""Answers a job with the CUDA backend and prints the tokens as JSON; a process of its own, because the
emulator reads its settings once. Usage: python -m tests.gpu.run_engine JOB.json"""

import json
import sys
from pathlib import Path
from typing import Any

import loraserve.engine.model_runner
import torch
from loraserve import LLM, SamplingParams, _core
from loraserve.backends.cuda.backend import CudaBackend
from loraserve.config import EngineConfig
from loraserve.models.decoder import Decoder
from loraserve.pooling.params import PoolingParams
from loraserve.request import GenerateRequest, TokenLogprob

from tests.gpu.device import open_driver
from tests.gpu.emulated_backend import EmulatedBackend


def main(job: dict[str, Any]) -> dict[str, Any]:
    driver, reason = open_driver()
    assert driver is not None, reason
    backends: list[CudaBackend] = []
    steps_ahead: list[int] = []
    open_real = loraserve.engine.model_runner.open_backend

    def open_backend(config: EngineConfig) -> CudaBackend:
        assert driver is not None
        opened = EmulatedBackend(config, driver) if driver.is_emulated else open_real(config)
        assert isinstance(opened, CudaBackend)
        backends.append(opened)
        _count_steps_ahead(opened, steps_ahead)
        return opened

    loraserve.engine.model_runner.open_backend = open_backend
    answers = answer(job, "cuda")
    return answers | {
        "captures": _captures(backends),
        "pool_nbytes": backends[0].pool.numel(),
        "steps_ahead": len(steps_ahead),
    }


def _count_steps_ahead(backend: CudaBackend, steps_ahead: list[int]) -> None:
    """Adds to the list the tokens of each step that the host had not seen when it launched the step."""
    logits = backend.logits

    def counted(decoder: Decoder, batch: _core.Batch) -> torch.Tensor:
        num_unseen = int((batch.arrays()["token_ids"] < 0).sum())
        if num_unseen > 0:
            steps_ahead.append(num_unseen)
        return logits(decoder, batch)

    vars(backend)["logits"] = counted


def _captures(backends: list[CudaBackend]) -> int:
    graphs = backends[0]._graphs
    return 0 if graphs is None else graphs.num_captured


def answer(job: dict[str, Any], device: str, **settings: Any) -> dict[str, Any]:
    """Per round and request: the tokens, and how much likelier than the next best the closest choice was."""
    params = SamplingParams(max_tokens=job["max_tokens"], temperature=0.0, ignore_eos=True, logprobs=2)
    rounds, margins = [], []
    with LLM(job["model"], adapters=job["adapters"], device=device, **{**job["settings"], **settings}) as llm:
        for requests in job["rounds"]:
            prompts = [prompt for prompt, _ in requests]
            adapters = [adapter for _, adapter in requests]
            outputs = llm.generate(prompts, params, adapters, progress=False)
            rounds.append([output.token_ids for output in outputs])
            margins.append([min(map(_margin, output.logprobs or [])) for output in outputs])
        pooled = _pooled(llm, job)
        host_tier_hits = llm.stats().host_tier.num_hits
    return {"rounds": rounds, "margins": margins, "host_tier_hits": host_tier_hits, "pooled": pooled}


def _pooled(llm: LLM, job: dict[str, Any]) -> list[list[float]]:
    """Of (prompt, adapter, fields of PoolingParams), one batch with answers; then logprobs of the prompts."""
    asked = [
        GenerateRequest(prompt=prompt, adapter=adapter, pooling=PoolingParams(**fields))
        for prompt, adapter, fields in job.get("pooled", ())
    ]
    answers = [GenerateRequest(prompt=one.prompt, adapter=one.adapter) for one in asked]
    outputs = llm._run.run([*asked, *answers], progress=False)[: len(asked)]
    values = [output.completions[0].pooled for output in outputs]
    scores = SamplingParams(max_tokens=0, prompt_logprobs=0)
    scored = [llm.generate([one.prompt or ()], scores, one.adapter, progress=False)[0] for one in asked]
    return [one.values.ravel().tolist() for one in values if one is not None] + [
        [token.logprob for token in one.prompt_logprobs or () if token is not None] for one in scored
    ]


def _margin(logprob: TokenLogprob) -> float:
    (_, best), (_, second) = logprob.top
    return best - second


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
