"""Processes of a model shared out: what they are refused, and what becomes of everyone when one is lost."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loraserve import LLM, SamplingParams
from loraserve.backends.tensor_parallel import backend, ranks
from loraserve.errors import DeviceError, EngineStoppedError, ModelError

from tests.models.tiny import make_model, save_model

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "memory": "32MiB",
    "tensor_parallel_size": 2,
}
PROMPT = [11, 20, 105, 17, 92]
SHORT = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
WAIT_S = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(make_model("llama"), tmp_path_factory.mktemp("model")))


@pytest.fixture
def llm(model: str) -> Iterator[LLM]:
    with LLM(model, **SETTINGS) as llm:
        yield llm


def other_ranks(llm: LLM) -> list[int]:
    """Process ids."""
    return [rank.popen.pid for rank in llm._engine.runner.backend._ranks._ranks]  # type: ignore[attr-defined]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Ended, whoever has to be told so."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def ask_in_thread(llm: LLM) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            llm.generate([PROMPT] * 4, LONG)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: llm.info().num_running > 0 or bool(errors))
    return thread, errors


def test_everyone_is_told_of_a_rank_that_is_killed_and_a_new_engine_works(model: str, llm: LLM) -> None:
    expected = llm.generate([PROMPT], SHORT)[0].token_ids
    (pid,) = other_ranks(llm)
    thread, errors = ask_in_thread(llm)
    os.kill(pid, signal.SIGKILL)
    thread.join(WAIT_S)
    (error,) = errors
    assert isinstance(error, EngineStoppedError)
    assert f"rank 1 (process {pid}) was killed by signal 9" in str(error)
    with pytest.raises(EngineStoppedError, match="rank 1"):
        llm.generate([PROMPT], SHORT)
    with LLM(model, **SETTINGS) as again:
        assert again.generate([PROMPT], SHORT)[0].token_ids == expected


def test_an_idle_engine_notices_the_loss_of_a_rank(llm: LLM) -> None:
    (pid,) = other_ranks(llm)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: llm._engine.refusal is not None)
    assert "was killed by signal 9" in str(llm._engine.refusal)


def test_a_rank_that_hangs_is_given_up_and_ended(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "ANSWER_LIMIT_S", 3.0)
    monkeypatch.setattr(ranks, "END_LIMIT_S", 600.0)  # a server that stops doesn't wait for it
    with LLM(model, **SETTINGS | {"tensor_parallel_size": 4}) as llm:
        pids = other_ranks(llm)
        thread, errors = ask_in_thread(llm)
        os.kill(pids[1], signal.SIGSTOP)
        thread.join(WAIT_S)
        (error,) = errors
        assert isinstance(error, EngineStoppedError)
        assert f"rank 2 (process {pids[1]}) did not answer" in str(error)
        assert all(is_gone(pid) for pid in pids)


def test_a_step_that_fails_at_a_rank_says_why(llm: LLM) -> None:
    """A command that no rank understands stands for whatever may go wrong there."""
    pool = llm._engine.runner.backend._ranks  # type: ignore[attr-defined]
    pool.tell(ranks.Message.STEP, b"no batch")
    wait_until(lambda: llm._engine.refusal is not None)
    with pytest.raises(EngineStoppedError, match=r"rank 1 .*ValueError: the bytes of a batch end"):
        llm.generate([PROMPT], SHORT)


def test_closing_leaves_no_process_and_no_folder(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with LLM(model, **SETTINGS) as llm:
        pids = other_ranks(llm)
        llm.generate([PROMPT], SHORT)
    assert all(is_gone(pid) for pid in pids)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_nobody_holds_takes_its_ranks_along(model: str) -> None:
    llm = LLM(model, **SETTINGS)
    (pid,) = other_ranks(llm)
    llm.generate([PROMPT], SHORT)
    del llm
    gc.collect()
    wait_until(lambda: is_gone(pid))


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit()", "os._exit(3)"])
def test_ranks_end_with_rank_0_however_it_ends(model: str, ending: str) -> None:
    code = (
        "import os, signal, sys\n"
        "from loraserve import LLM, SamplingParams\n"
        f"llm = LLM({model!r}, **{SETTINGS!r})\n"
        f"llm.generate([{PROMPT}], SamplingParams(max_tokens=2))\n"
        "print(*[rank.popen.pid for rank in llm._engine.runner.backend._ranks._ranks], flush=True)\n"
        f"{ending}\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.PIPE, text=True)
    (pid,) = ended.stdout.split()
    wait_until(lambda: is_gone(int(pid)))


def test_a_rank_that_can_not_start_is_named(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "START_CODE", "import sys; sys.exit(5)")
    with pytest.raises(DeviceError, match=r"rank 1 \(process \d+\) ended with status 5"):
        LLM(model, **SETTINGS)


@pytest.mark.parametrize(
    ("sizes", "size", "possible"),
    [
        ({}, 3, "1, 2, 4 would do"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96}, 3, "1, 2 would do"),
        ({"intermediate_size": 95}, 2, "; 1 would do"),
        ({"vocab_size": 16}, 2, "; 1 would do"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_what_would_do(
    tmp_path: Path, sizes: dict[str, int], size: int, possible: str
) -> None:
    path = save_model(make_model("llama", **sizes), tmp_path)
    with pytest.raises(ModelError, match=f"tensor_parallel_size is {size}, .*{possible}"):
        LLM(str(path), **SETTINGS | {"tensor_parallel_size": size})
