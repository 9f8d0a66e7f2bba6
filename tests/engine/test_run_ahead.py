"""A device that is given its next step before the host knows the tokens of the last: answers are the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from loraserve import LLM, SamplingParams, _core
from loraserve.backends import Backend
from loraserve.backends.base import PlacedModel
from loraserve.backends.cpu.backend import CpuBackend
from loraserve.config import EngineConfig
from loraserve.engine import model_runner
from loraserve.models.config import ModelConfig
from loraserve.models.decoder import Decoder
from loraserve.models.ops import KvGeometry, PendingRows
from loraserve.models.weights import BuildDecoder

NUM_REQUESTS = 48
MAX_NUM_SEQS = 12


class QueueBackend(CpuBackend):
    """Computes at once, but puts the tokens in that it sampled last, as a device with a queue does.

    Its host must not see them before it has launched all it can.
    """

    runs_ahead = True
    num_ahead = 0

    def place(self, model: ModelConfig, geometry: KvGeometry, build: BuildDecoder) -> PlacedModel:
        placed = super().place(model, geometry, build)
        ops: Any = placed.ops
        sample = ops.sample

        def sample_and_keep(logits: torch.Tensor, arrays: _core.SampleArrays) -> PendingRows:
            rows: PendingRows = sample(logits, arrays)
            self._last: npt.NDArray[np.int32] = rows.wait().token_ids
            return rows

        ops.sample = sample_and_keep
        return placed

    def logits(self, decoder: Decoder, batch: _core.Batch) -> torch.Tensor:
        arrays = batch.arrays()
        awaited = arrays["token_ids"] < 0
        if not awaited.any():
            return super().logits(decoder, batch)
        type(self).num_ahead += 1
        arrays["token_ids"][awaited] = self._last[-1 - arrays["token_ids"][awaited]]
        return super().logits(decoder, _core.Batch(arrays, batch.num_prefill_tokens))


class Asked(NamedTuple):
    """Prompts, how to sample each, and by which adapter."""

    prompts: list[list[int]]
    params: list[SamplingParams]
    adapters: list[str | None]


def questions(names: list[str], **settings: Any) -> Asked:
    """Ends by length and by stop tokens, short and long prompts, greedy and seeded."""
    draw = random.Random(5)
    asked = Asked([], [], [])
    for index in range(NUM_REQUESTS):
        asked.prompts.append([draw.randrange(5, 200) for _ in range(draw.choice((1, 3, 20, 90)))])
        asked.adapters.append(draw.choice([None, *names]))
        asked.params.append(
            SamplingParams(
                max_tokens=draw.randrange(1, 40),
                min_tokens=draw.choice((0, 1)),
                temperature=draw.choice((0.0, 1.0)),
                top_p=draw.choice((1.0, 0.9)),
                stop_token_ids=draw.sample(range(49152), 12_000),
                seed=index,
                **settings,
            )
        )
    return asked


def answers(model: str, adapters: dict[str, str], asked: Asked, memory: str) -> list[tuple[list[int], str]]:
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_num_seqs": MAX_NUM_SEQS}
    with LLM(model, adapters, memory=memory, **settings) as llm:
        outputs = llm.generate(asked.prompts, asked.params, asked.adapters, progress=False)
        assert llm.stats().num_kv_pages == 0
    return [(output.token_ids, str(output.finish_reason)) for output in outputs]


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> type[QueueBackend]:
    """Engines built from now on run ahead."""

    def open_backend(config: EngineConfig) -> Backend:
        return QueueBackend(config, torch.float32)

    monkeypatch.setattr(QueueBackend, "num_ahead", 0)
    monkeypatch.setattr(model_runner, "open_backend", open_backend)
    return QueueBackend


@pytest.mark.parametrize("memory", ["32MiB", "1MiB"])  # 1 MiB: someone must wait, or give up what it has
def test_answers_are_those_of_steps_one_after_another(
    tiny_model: tuple[Path, torch.nn.Module],
    tiny_adapters: dict[str, str],
    memory: str,
    request: pytest.FixtureRequest,
) -> None:
    adapters = dict(list(tiny_adapters.items())[:6])
    asked = questions(list(adapters))
    expected = answers(str(tiny_model[0]), adapters, asked, memory)
    assert {reason for _, reason in expected} == {"length", "stop"}
    backend = request.getfixturevalue("ahead")
    assert answers(str(tiny_model[0]), adapters, asked, memory) == expected
    assert backend.num_ahead > 20


def test_rows_that_need_their_last_token_are_not_run_ahead(
    tiny_model: tuple[Path, torch.nn.Module], ahead: type[QueueBackend]
) -> None:
    asked = questions([], presence_penalty=0.5)
    answers(str(tiny_model[0]), {}, asked, "32MiB")
    assert ahead.num_ahead == 0
