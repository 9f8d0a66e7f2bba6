"""Every launch that benches/bench_gpu_kernels.py times runs, here with the shapes of a small model."""

import dataclasses
import sys
from pathlib import Path

import pytest

from tests.gpu.device import Gpu

sys.path.insert(0, str(Path(__file__).parents[2] / "benches"))

from gpu_kernels import LLAMA_3_8B, Bench, Shapes

SMALL = Shapes(
    hidden=128,
    intermediate=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rank=8,
    num_layers=2,
    context_len=40,
    batch_sizes=(1, 8),
    prompt_tokens=96,
    vocab_size=1000,
)


def test_every_case_runs(gpu: Gpu) -> None:
    bench = Bench(SMALL, gpu.place, gpu.stream)
    cases = list(bench.cases())
    for case in cases:
        case.begin(gpu.stream)(gpu.stream)
        gpu.synchronize()
        assert case.nbytes > 0
    assert len({(case.op, case.num_rows, case.mix) for case in cases}) == len(cases)


@pytest.mark.parametrize(("group", "nbytes"), [(0, 589824), (1, 262144), (2, 1179648), (3, 589824)])
def test_bytes_of_an_adapter_are_those_of_its_matrices(group: int, nbytes: int) -> None:
    """Rank 16 of Llama-3-8B; qkv: 3·16·4096 of A and 16·6144 of B, two bytes each."""
    assert LLAMA_3_8B.lora_nbytes(group) == nbytes
    assert dataclasses.replace(LLAMA_3_8B, rank=32).lora_nbytes(group) == 2 * nbytes
