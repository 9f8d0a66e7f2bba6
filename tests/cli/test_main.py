"""The command line without a model: usage, help, versions, and errors as one line."""

import subprocess
import sys
from pathlib import Path

import pytest
from loraserve import _core
from loraserve.cli import main
from loraserve.cli.adapters import ranges

FREE_PORTS = ["--grpc-port", "0", "--http-port", "0"]  # the usual ones may be taken here

COMMANDS = [["serve"], ["generate"], ["adapters"], ["adapters", "check"], ["config"], ["config", "check"]]


def test_version_is_that_of_the_compiled_core(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"loraserve {_core.__version__}\n"


@pytest.mark.parametrize("command", [[], *COMMANDS])
def test_help_describes_every_command(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "usage: loraserve" in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], *COMMANDS])
def test_help_lists_choices_as_they_are_typed(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    assert "('" not in capsys.readouterr().out  # a tuple among the choices


@pytest.mark.parametrize("command", [["serve"], ["generate"], ["adapters", "check"]])
def test_help_teaches_with_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    assert f"examples:\n  loraserve {' '.join(command)} smollm2" in capsys.readouterr().out.replace(
        "adapters/sql --model smollm2", "smollm2"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "required: COMMAND"),
        (["adapters"], "required: ACTION"),
        (["config", "check"], "required: FILE"),
        (["generate", "m"], "required: -p/--prompt"),
        (["serve", "m", "--adapter", "sql"], "'sql' is not NAME=PATH"),
        (["serve", "m", "--adapter", "a=x", "--adapter", "a=y"], "--adapter names 'a' twice"),
        (["serve", "m", "--dtype", "int4"], "invalid choice: 'int4'"),
        (["serve", "m", "--grpc-port", "http"], "invalid int value: 'http'"),
        (["serve", "m", "--http-port", "on"], "invalid int value: 'on'"),
        (["serve", "m", "--model-id", "n"], "MODEL is 'm' and --model-id is 'n'"),
        (["serve", "m", "--lora-adapters", "a=b=c"], "--lora-adapters: lora adapter 'a=b=c' is not id"),
        (["serve", "m", "--adapter", "a=x", "--lora-adapters", "a=y"], "--adapter names 'a' twice"),
        (["serve", "m", "--quantize", "exl2"], "--quantize: quantization is 'exl2', it must be one of auto"),
        (["generate", "m", "-p", "x", "-a", "a=heavy"], "'a=heavy' is not NAME or NAME=WEIGHT"),
        (["generate", "m", "-p", "x", "--adapter", "a=x", "-a", "a", "-a", "a"], "-a names 'a' twice"),
        (["generate", "m", "-p", "x", "-a", "sql"], "-a names 'sql', give its files with --adapter sql=PATH"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["serve", "m", "--memory", "lots", *FREE_PORTS],
            "memory is 'lots', write it as 512MiB, 2GiB or auto",
        ),
        (["serve", "m", "--memory", "0", *FREE_PORTS], "memory is '0', it must be more than 0 bytes"),
        (
            ["serve", "m", "--max-lora-rank", "0"],
            "--max-lora-rank: input should be greater than or equal to 1",
        ),
        (["serve", "m", "--threads", "-2"], "--threads: input should be greater than or equal to 1, got -2"),
        (["serve", "m", "--threads", "1000000"], "--threads: input should be less than or equal to 1024"),
        (["generate", "m", "-p", "x", "--threads", "1000000"], "num_threads is 1000000, it must be from 1"),
        (["serve"], "model is missing"),
        (
            ["serve", "m", "--grpc-port", "70000"],
            "--grpc-port: input should be less than or equal to 65535, got 70000",
        ),
        (["serve", "m", "--port", "-1"], "--http-port: input should be greater than or equal to 0, got -1"),
        (["serve", "m", "--drain-seconds", "-1"], "--drain-seconds: "),
        (["serve", "m", "--drain-seconds", "nan"], "--drain-seconds: "),
        (["serve", "m", "--http-port", "off", "--grpc-port", "off"], "serve at least one API"),
        (["serve", "m", "--config", "/no/such.yaml"], "/no/such.yaml can't be read"),
        (["serve", "m", "--tls-key", "x"], "give both tls_certificate and tls_key"),
        (
            [
                "serve",
                "m",
                "--grpc-port",
                "0",
                "--http-port",
                "0",
                "--tls-key",
                "/none",
                "--tls-certificate",
                "/none",
            ],
            "TLS file /none can't be read",
        ),
        (
            ["serve", "m", "--keys-file", "/none", "--grpc-port", "0", "--http-port", "0"],
            "/none can't be read",
        ),
        (["serve", "./none", "--grpc-port", "0", "--http-port", "0"], "model path ./none does not exist"),
        (["config", "check", "/no/such.yaml"], "/no/such.yaml can't be read"),
        (["generate", "./none", "-p", "x"], "model path ./none does not exist"),
        (
            ["generate", "m", "-p", "x", "--temperature", "nan"],
            "temperature is nan, it must be a finite number",
        ),
        (["generate", "m", "-p", "x", "--max-tokens", "0"], "max_tokens is 0, it must be from 1"),
        (["adapters", "check", "x", "--model", "./none"], "model path ./none does not exist"),
    ],
)
def test_an_error_is_one_line_and_exits_with_1(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("loraserve: error: ")] == lines
    assert len(lines) == 1
    assert text in lines[0]


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_neither_torch_nor_grpc(option: str) -> None:
    code = f"import runpy, sys, atexit; sys.argv[1:] = ['{option}']; runpy.run_module('loraserve')"
    check = "import os; os._exit(1 if {'torch', 'grpc', 'numpy'} & sys.modules.keys() else 0)"
    code = f"import atexit, sys; atexit.register(lambda: exec({check!r})); {code}"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_command_line_imports_neither_torch_nor_grpc() -> None:
    code = "import sys, loraserve.cli; sys.exit(bool({'torch', 'grpc', 'numpy'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m loraserve --help 2>{tmp_path}/stderr | true"
    subprocess.run(["bash", "-c", command], check=True)
    assert "Traceback" not in (tmp_path / "stderr").read_text()


@pytest.mark.parametrize(
    "arguments", ["serve smollm2 --dtype int8", "serve smollm2 --adapter sql", "generate", "nothing", ""]
)
def test_a_usage_error_is_one_line_and_where_to_read_more(arguments: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "loraserve", *arguments.split()], check=False, capture_output=True, text=True
    )
    error, more = result.stderr.splitlines()
    assert result.returncode == 2
    assert ": error: " in error
    assert more.endswith("--help` lists what can be given")


@pytest.mark.parametrize("arguments", ["--version", "doctor"])
def test_output_that_cannot_be_written_is_one_line(arguments: str, tmp_path: Path) -> None:
    command = f"{sys.executable} -m loraserve {arguments} 2>{tmp_path}/stderr >/dev/full"
    result = subprocess.run(["bash", "-c", command], check=False)
    said = (tmp_path / "stderr").read_text()
    assert said == "loraserve: error: the output can't be written: No space left on device\n"
    assert result.returncode == 1


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8"), ([0, 2], "0, 2")]
)
def test_runs_of_layers_are_shortened(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text
