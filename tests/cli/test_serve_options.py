"""Flags of `serve`: one for each setting, as its variable and its help say."""

import argparse

import pytest
from loraserve.cli.main import build_parser, main
from loraserve.cli.options import engine_config
from loraserve.cli.serve_options import GivenFlags, add_serve_options, given_flags
from loraserve.settings.foreign import FOREIGN_SETTINGS
from loraserve.settings.schema import ServeSettings

SETTINGS = [name for name, field in ServeSettings.model_fields.items() if field.json_schema_extra is not None]
ONLY_IN_FILES = {"keys"}


def flags(*arguments: str) -> GivenFlags:
    parser = argparse.ArgumentParser()
    add_serve_options(parser)
    return given_flags(parser.parse_args(arguments), parser)


def parse(*arguments: str) -> dict[str, object]:
    return flags(*arguments).values


def help_text(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_every_setting_has_a_flag_a_variable_and_a_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys)
    for name in SETTINGS:
        flag = {"model": "MODEL", "adapters": "--adapter"}.get(name, f"--{name.replace('_', '-')}")
        assert f" {flag} " in text or f" {flag}," in text or f"[{flag}]" in text
        assert f"[LORASERVE_{name.upper()}" in text
        assert ServeSettings.model_fields[name].description
    assert set(ServeSettings.model_fields) - set(SETTINGS) == ONLY_IN_FILES


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ([], {}),
        (["m"], {"model": "m"}),
        (["--model-id", "m"], {"model": "m"}),
        (["--port", "3000"], {"http_port": 3000}),
        (["--http-port", "off"], {"http_port": "off"}),
        (["--hostname", "::"], {"host": "::"}),
        (["--max-input-length", "5"], {"max_input_tokens": 5}),
        (["--max-total-tokens", "5"], {"max_model_len": 5}),
        (["--max-batch-prefill-tokens", "5"], {"max_prefill_tokens": 5}),
        (["--chunked-prefill-size", "5"], {"max_prefill_tokens": 5}),
        (["--max-num-batched-tokens", "5"], {"max_batched_tokens": 5}),
        (["--max-concurrent-requests", "128"], {"max_concurrent_requests": 128}),
        (["--no-prefix-caching"], {"prefix_caching": False}),
        (["--open-metrics"], {"open_metrics": True}),
        (["--drain-seconds", "1.5"], {"drain_seconds": 1.5}),
        (["--threads", "2"], {"threads": 2}),
        (["--adapter-root", "a", "--adapter-root", "b"], {"adapter_root": ["a", "b"]}),
        (["--adapter", "a=/x", "--adapter", "b=y@z"], {"adapters": {"a": "/x", "b": "y@z"}}),
        (["--lora-adapters", "a=/x"], {"adapters": {"a": {"path": "/x", "revision": None}}}),
        (["--num-shard", "1"], {"tensor_parallel_size": "1"}),
    ],
)
def test_flags_are_read(arguments: list[str], values: dict[str, object]) -> None:
    assert parse(*arguments) == values


JSON_ONE = '{"name": "a", "path": "/x", "base_model_name": "m"}'


def test_sharded_is_taken_beside_a_number_and_told_to_need_one() -> None:
    given = flags("--sharded", "true", "--num-shard", "2")
    assert given.values == {"tensor_parallel_size": "2"}
    assert given.notes == [
        "--sharded has no effect here: --tensor-parallel-size, or --num-shard, says among how many processes"
    ]


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["m", "--lora-modules", "a=/x", "b=org/y"], {"model": "m", "adapters": {"a": "/x", "b": "org/y"}}),
        (["--lora-modules", JSON_ONE, "b=/y"], {"adapters": {"a": "/x", "b": "/y"}}),
        (["--lora-modules", f"[{JSON_ONE}]"], {"adapters": {"a": "/x"}}),
        (["--lora-modules", "a=/x", "--adapter", "b=/y"], {"adapters": {"a": "/x", "b": "/y"}}),
        (["--enable-lora", "--model", "m"], {"model": "m"}),
        (["--max-lora-rank", "16"], {"max_lora_rank": 16}),
        (["--max-num-batched-tokens", "512"], {"max_batched_tokens": 512}),
        (["--max-num-seqs", "8"], {"max_num_seqs": 8}),
        (["--enable-prefix-caching"], {"prefix_caching": True}),
        (["--no-enable-prefix-caching"], {"prefix_caching": False}),
        (["--max-model-len", "512"], {"max_model_len": 512}),
        (["--dtype", "auto"], {"dtype": "auto"}),
        (["--dtype", "half"], {"dtype": "half"}),
        (["--quantization", "int8"], {"quantization": "int8"}),
        (["-q", "awq_marlin"], {"quantization": "awq_marlin"}),
        (["--adapter-dtype", "int8", "--lora-dtype", "auto"], {"adapter_dtype": "int8"}),
        (["--quantize", "gptq"], {"quantization": "gptq"}),
        (["--api-key", "k"], {"api_key": "k"}),
        (["m", "--served-model-name", "one", "two"], {"model": "m", "served_model_name": ["one", "two"]}),
        (["--host", "::", "--port", "1"], {"host": "::", "http_port": 1}),
        (["-p", "1"], {"http_port": 1}),
        (["--task", "embed", "--runner", "pooling"], {}),
        (["--ssl-keyfile", "k", "--ssl-certfile", "c"], {"tls_key": "k", "tls_certificate": "c"}),
        (["--kv-cache-memory-bytes", "1000000"], {"memory": "1000000"}),
        (["-tp", "2", "--pipeline-parallel-size", "1"], {"tensor_parallel_size": 2}),
        (["--num-shard", "2"], {"tensor_parallel_size": "2"}),
        (["--json-output"], {"log_format": "json"}),
        (["--gpu-memory-utilization", "0.8"], {"gpu_memory_utilization": 0.8}),
        (["--cuda-memory-fraction", "0.8"], {"gpu_memory_utilization": 0.8}),
        (["--enforce-eager"], {"cuda_graphs": False}),
        (["--eager"], {"cuda_graphs": False}),
        (["--no-cuda-graphs"], {"cuda_graphs": False}),
        (["--cors-allow-origin", "https://a", "--cors-origin", "*"], {"cors_origin": ["https://a", "*"]}),
        (["--payload-limit", "5"], {"max_body_size": 5}),
        (["--graceful-termination-timeout", "5"], {"drain_seconds": 5.0}),
        (["--max-batch-size", "5"], {"max_num_seqs": 5}),
        (
            [
                "--tool-call-parser",
                "hermes",
                "--reasoning-parser",
                "deepseek_r1",
            ],
            {"tool_parser": "hermes", "reasoning_parser": "deepseek_r1"},
        ),
        (["--sharded", "false", "--usage-stats", "off"], {}),
        (
            ["--preloaded-adapter-ids", "org/a@v1"],
            {"adapters": {"org-a": {"repo": "org/a", "revision": "v1", "warm": True}}},
        ),
    ],
)
def test_flags_of_other_servers_mean_what_they_mean_there(
    arguments: list[str], values: dict[str, object]
) -> None:
    assert flags(*arguments) == GivenFlags(values, [])


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        (["--max-loras", "4"], "a batch mixes any number of adapters"),
        (["--enable-auto-tool-choice"], "it is always so"),
        (["--max-cpu-loras", "4"], "--adapter-host-memory bounds"),
        (["--waiting-served-ratio", "0.3"], "waiting requests join at every step"),
        (["--max-batch-total-tokens", "9"], "--memory bounds the batch"),
        (["--disable-log-requests"], "it tunes another engine"),
        (["--trust-remote-code"], "code of a model's repository never runs"),
        (["--max-active-adapters", "9"], "a batch mixes as many adapters as fit"),
    ],
)
def test_a_flag_without_effect_is_noted(arguments: list[str], note: str) -> None:
    given = flags(*arguments)
    assert given.values == {}
    assert len(given.notes) == 1
    assert given.notes[0].startswith(f"{arguments[0]} has no effect here: {note}")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--pipeline-parallel-size", "2"], "only 1 is possible"),
        (["--sharded", "maybe"], "says among how many processes"),
        (
            ["--quantize", "bitsandbytes"],
            "--quantize: quantization is 'bitsandbytes', it must be one of auto",
        ),
        (["--kv-cache-dtype", "fp8"], "the KV cache has the dtype of --dtype"),
        (["--adapter-id", "org/a"], "serve it by --adapter NAME=SOURCE"),
        (["--merge-adapter-weights"], "--adapter NAME=SOURCE --merge NAME"),
        (["--no-enable-lora"], "give none"),
        (["--chat-template", "x.jinja"], "put the file into the model's directory"),
        (["--tokenizer", "other"], "the tokenizer is the model's"),
        (["--download-dir", "/x"], "HF_HUB_CACHE"),
        (["--disable-grammar-support"], "grammars can't be switched off"),
        (["--lora-modules", "a"], "neither name=path nor"),
        (["--lora-modules", "{"], "is not JSON"),
        (["--lora-modules", '{"name": "a"}'], '"path"'),
        (["--lora-modules", '{"name": "a", "path": "/x", "colour": "red"}'], "base_model_name"),
        (["--lora-modules", '{"name": "a", "path": 3}'], "no text"),
        (["--lora-modules", "a=/x", "a=/y"], "names 'a' twice"),
    ],
)
def test_a_flag_that_asks_for_more_says_what_to_do(
    capsys: pytest.CaptureFixture[str], arguments: list[str], error: str
) -> None:
    with pytest.raises(SystemExit):
        flags(*arguments)
    message = capsys.readouterr().err.splitlines()[-1]
    assert ": error: --" in message
    assert error in message


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["serve", "m", "--prefix-cachin"], "did you mean --prefix-caching?"),
        (["serve", "m", "--max-lora", "4"], "did you mean --max-loras?"),
        (["serve", "m", "--nothing-like-it=3"], "unrecognized arguments: --nothing-like-it=3"),
        (["serve", "m", "--nothing-like-it=3"], "`loraserve serve --help` lists what can be given"),
        (["serve", "--prefix-caching", "true"], "switches take no value"),
        (["serve", "--adapter", "a=/x", "--lora-modules", "a=/y"], "names 'a' twice"),
    ],
)
def test_wrong_usage_is_told(capsys: pytest.CaptureFixture[str], arguments: list[str], error: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert error in capsys.readouterr().err


def test_what_becomes_of_other_servers_flags_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys)
    for setting in FOREIGN_SETTINGS:
        if setting.is_flag:
            assert f"{setting.flag}" in text
            assert setting.text in text


def test_generate_takes_what_adapters_are_kept_in_and_where() -> None:
    flags = ["--adapter-dtype", "int8", "--adapter-host-memory", "0"]
    args = build_parser().parse_args(["generate", "m", "-p", "hi", *flags])
    config = engine_config(args, args.parser)
    assert (config.adapter_dtype, config.adapter_host_nbytes) == ("int8", 0)
