"""The engine's bench of a GPU measures all it should, here with a toy model on the CPU."""

from pathlib import Path

import bench_gpu_engine
import loraserve.engine.model_runner
import pytest
import torch
from loraserve.backends.cpu.backend import CpuBackend
from loraserve.config import EngineConfig


def test_every_part_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_model = loraserve.engine.model_runner.load_model
    monkeypatch.setattr(loraserve.engine.model_runner, "load_model", load_model)  # restored afterwards
    plan = bench_gpu_engine.TOY
    config = EngineConfig(model="random weights", memory=plan.memory)
    bench = bench_gpu_engine.Bench(plan, tmp_path, CpuBackend(config, torch.bfloat16))
    try:
        for part in (bench.decode, bench.prefill, bench.loads, bench.host_times):
            part()
    finally:
        bench.engine.shutdown(0.0)
    shown = capsys.readouterr().out
    for title in ("Decode", "Prefill", "Loads under decode", "The engine's thread"):
        assert f"### {title}" in shown
    assert shown.count("| greedy |") == 5
