"""The whole engine on the CUDA backend answers what the CPU backend answers, token for token."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.oracle import AdapterSpec, make_adapter
from tests.e2e.tiny import PROMPT
from tests.gpu.driver import Driver
from tests.gpu.run_engine import answer

pytestmark = [  # PEFT's, of lora_bias
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed"),
    pytest.mark.filterwarnings("ignore:.*have invalid shape"),
]
EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
DECISIVE = 0.01  # margin of natural-log probability that bfloat16 does not turn over in these models
SETTINGS = {"dtype": "bfloat16", "memory": "1MiB", "max_num_seqs": 16, "max_model_len": 64}


def run_on_cuda(job: dict[str, Any], directory: Path, **environment: str) -> dict[str, Any]:
    path = directory / "job.json"
    path.write_text(json.dumps(job))
    command = [sys.executable, "-m", "tests.gpu.run_engine", str(path)]
    environment = {**os.environ, "CUEMU_HOST_OK": "1", "CUEMU_INITCHECK": "0", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture
def job(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str], tmp_path: Path
) -> dict[str, Any]:
    """Rounds of other mixes: base and adapters, gains and shifts, one for all, several in one token, none."""
    adapters = dict(list(tiny_adapters.items())[:4])
    for seed, extra in enumerate(({"use_dora": True}, {"lora_bias": True})):
        spec = AdapterSpec("-".join(extra), 6, ["q_proj", "down_proj"], std=0.5, extra=extra)
        adapters[spec.name] = str(make_adapter(tiny_model[1], spec, tmp_path, seed))
    names = list(adapters)
    mixed = [(PROMPT[: 2 + index], name) for index, name in enumerate([None, *names])]
    return {
        "model": str(tiny_model[0]),
        "adapters": adapters,
        "settings": SETTINGS,
        "max_tokens": 5,
        "rounds": [
            mixed,
            [(PROMPT, names[0])] * 3,
            [(PROMPT, {names[1]: 0.5, names[2]: -0.25}), (PROMPT[:4], None)],
            [(PROMPT[:3], None)] * 2,
            list(reversed(mixed)),
        ],
    }


def test_mixed_batches_are_answered_as_on_the_cpu(
    driver: Driver, job: dict[str, Any], tmp_path: Path
) -> None:
    actual = run_on_cuda(job, tmp_path)
    check(job, actual)
    # At start, of 1, 2, 4, 8 and 16 rows, without adapters and with; at 16 also with few.
    assert actual["captures"] == 11
    assert actual["steps_ahead"] > 0  # launched before the host had the tokens of the step before


def test_without_memory_given_the_pool_is_what_weights_and_the_largest_step_leave(
    driver: Driver, job: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**SETTINGS, "gpu_memory_utilization": 0.75, "cuda_graphs": False}
    job |= {"settings": {name: value for name, value in settings.items() if name != "memory"}}
    job["rounds"] = job["rounds"][:1]
    actual = run_on_cuda(job, tmp_path)
    check(job | {"settings": SETTINGS}, actual)
    assert actual["captures"] == 0
    if driver.is_emulated:
        assert (1 << 28) - (1 << 22) < actual["pool_nbytes"] <= (1 << 28) + (1 << 22)


def test_loads_and_steps_on_lazy_streams_wait_for_each_other(
    driver: Driver, job: dict[str, Any], tmp_path: Path
) -> None:
    if not driver.is_emulated:
        pytest.skip("a GPU has no lazy streams")
    job["settings"] = {**SETTINGS, "memory": "96KiB"}  # adapters come and go
    actual = run_on_cuda(job, tmp_path, CUEMU_LAZY="1", CUEMU_SCHED="2", CUEMU_SEED="7")
    check(job, actual)
    assert actual["host_tier_hits"] > 0  # some returned from main memory


def test_the_demo_adapters_answer_on_the_demo_model_as_on_the_cpu(
    driver: Driver, smollm2_path: str, tmp_path: Path
) -> None:
    adapters = {name: str(EXAMPLES / name) for name in ("sql", "pirate")}
    prompt = "Once upon a time there was a"  # each continues it in another way
    settings = {
        "dtype": "bfloat16",
        "quantization": "none",
        "memory": "64MiB",
        "max_num_seqs": 4,
        "max_model_len": 64,
    }
    job = {
        "model": smollm2_path,
        "adapters": adapters,
        # An emulator takes a graph's steps like others, and seconds for each that would be captured.
        "settings": {**settings, "cuda_graphs": not driver.is_emulated},
        "max_tokens": 2,
        "rounds": [[(prompt, None), (prompt, "sql"), (prompt, "pirate")]],
    }
    check(job, run_on_cuda(job, tmp_path))


def test_pooled_prompts_and_their_logprobs_are_as_on_the_cpu(
    driver: Driver, job: dict[str, Any], tmp_path: Path
) -> None:
    names = list(job["adapters"])
    kinds = [{}, {"kind": "mean"}, {"kind": "cls", "dimensions": 9}, {"task": "token_embed"}]
    job["pooled"] = [
        (PROMPT * 3, [None, *names][index % 3], fields) for index, fields in enumerate([*kinds, *kinds])
    ]
    job["settings"] = {**SETTINGS, "max_batched_tokens": 16}  # prompts of 27 tokens in chunks
    job["rounds"] = job["rounds"][:1]
    actual = run_on_cuda(job, tmp_path)
    check(job, actual)
    expected = answer(job, "cpu")["pooled"]
    assert len(actual["pooled"]) == len(expected) == 4 * len(kinds)
    for found, wanted in zip(actual["pooled"], expected, strict=True):
        assert torch.tensor(found) == pytest.approx(torch.tensor(wanted), abs=0.06)
        assert len(found) > 8


def check(job: dict[str, Any], actual: dict[str, Any]) -> None:
    """Every decisive answer is the CPU's; most are decisive, and adapters matter."""
    expected = answer(job, "cpu")["rounds"]
    margins = answer(job, "cpu", dtype="float32")["margins"]
    triples = [
        (margin, a, e)
        for round_margins, round_actual, round_expected in zip(
            margins, actual["rounds"], expected, strict=True
        )
        for margin, a, e in zip(round_margins, round_actual, round_expected, strict=True)
    ]
    decisive = [(a, e) for margin, a, e in triples if margin >= DECISIVE]
    assert 2 * len(decisive) >= len(triples)
    assert [a for a, _ in decisive] == [e for _, e in decisive]
    assert len({tuple(e) for _, e in decisive}) > 1
