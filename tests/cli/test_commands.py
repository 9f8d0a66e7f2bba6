"""The commands on the real model and on random adapters."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loraserve.cli import main

from tests.peft_writer import SMOLLM2_135M, llama_shape, write_adapter

GREEDY = ["--temperature", "0", "--max-tokens", "8", "--memory", "128MiB", "--dtype", "float32"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "sql"
    return write_adapter(path, SMOLLM2_135M, rank=8, layers=[0, 1, 2, 7], scale=0.5)


def test_generate_answers_in_order_with_and_without_an_adapter(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers(*options: str) -> str:
        prompts = ["-p", "The capital of France is", "-p", "The capital of Italy is"]
        assert main(["generate", "smollm2", *prompts, *options, *GREEDY]) == 0
        return capsys.readouterr().out

    base = answers()
    assert 0 <= base.index("Paris") < base.index("Rome")
    assert answers("--adapter", f"sql={adapter}", "-a", "sql") != base


def test_generate_leaves_to_an_adapter_what_is_not_given_and_tells_that_an_answer_is_cut(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "short"
    shutil.copytree(adapter, path)
    (path / "loraserve.json").write_text('{"sampling": {"max_tokens": 3, "temperature": 0}}')
    arguments = ["generate", "smollm2", "--memory", "256MiB", "--adapter", f"short={path}", "-a", "short"]
    assert main([*arguments, "-p", "The capital of France is"]) == 0
    assert capsys.readouterr().err.endswith("(cut after 3 tokens: --max-tokens N gives more)\n")
    assert main([*arguments, "-p", "The capital of France is", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().err.endswith("(cut after 5 tokens: --max-tokens N gives more)\n")


def test_generate_chat_uses_the_template(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "smollm2", "--chat", "-p", "What is the capital of Japan?", *GREEDY]) == 0
    assert capsys.readouterr().out == "The capital of Japan is Tokyo.\n"


def test_adapters_check_prints_the_receipt(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "check", str(adapter), "--model", "smollm2"]) == 0
    out = capsys.readouterr().out
    for line in (
        "tensors    16, all applied",
        "modules    q_proj, v_proj",
        "layers     0-2, 7",
        "ranks      8",
    ):
        assert f"{line}\n" in out


def test_adapters_check_refuses_what_does_not_fit(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = write_adapter(tmp_path / "narrow", llama_shape(4, 128, 4, 2, 32, 256))
    for path, options, text in (
        (narrow, [], "adapter wants in_features 128, base has 576"),
        (tmp_path / "none", [], "none"),
        (adapter, ["--max-lora-rank", "4"], "rank 8"),
    ):
        assert main(["adapters", "check", str(path), "--model", "smollm2", *options]) == 1
        error = capsys.readouterr().err
        assert error.startswith("loraserve: error: ")
        assert text in error


def test_generate_streams_into_a_pipe_and_survives_its_end() -> None:
    command = [sys.executable, "-m", "loraserve", "generate", "smollm2", "-p", "One", "--memory", "256MiB"]
    command += ["--max-tokens", "400", "--ignore-eos", "--temperature", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        assert process.wait(20.0) == 1
        assert process.stderr.read() == b""


def test_adapters_check_says_what_of_the_files_beside_the_weights_is_used(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = shutil.copytree(adapter, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (adapter / "generation_config.json").write_text('{"eos_token_id": [0, 2], "temperature": 0.5}')
    (adapter / "loraserve.json").write_text('{"stop": [";"], "system_prompt": "Be brief."}')
    assert main(["adapters", "check", str(adapter), "--model", "smollm2"]) == 0
    out = capsys.readouterr().out
    for line in (
        "template   of chat_template.jinja",
        "tokens     the model's",
        "ends with  '<|endoftext|>' (0), '<|im_end|>' (2)",
        "sampling   temperature 0.5, unless a request says otherwise",
        "manifest   loraserve.json: system_prompt, stop",
        "note       template: chat_template.jinja renders this adapter's chats",
        "note       end of sequence: '<|endoftext|>' (0), '<|im_end|>' (2), of generation_config.json",
    ):
        assert f"{line}\n" in out
    (adapter / "chat_template.jinja").unlink()
    (adapter / "loraserve.json").write_text('{"chat_template": "{% if %}"}')
    assert main(["adapters", "check", str(adapter), "--model", "smollm2"]) == 1
    assert "the chat template is malformed" in capsys.readouterr().err
