"""Flags of `serve`: one for each setting, as its variable and its help say."""

import argparse

import pytest
from loraserve.cli.main import build_parser
from loraserve.cli.serve_options import FOREIGN_FLAGS, add_serve_options, given_values
from loraserve.serve_config import ServeSettings

SETTINGS = [name for name, field in ServeSettings.model_fields.items() if field.json_schema_extra is not None]
ONLY_IN_FILES = {"keys"}


def parse(*arguments: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_serve_options(parser)
    return given_values(parser.parse_args(arguments), parser)


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
        (["--max-batch-prefill-tokens", "5"], {"max_batched_tokens": 5}),
        (["--max-concurrent-requests", "128"], {"max_concurrent_requests": 128}),
        (["--no-prefix-caching"], {"prefix_caching": False}),
        (["--open-metrics"], {"open_metrics": True}),
        (["--drain-seconds", "1.5"], {"drain_seconds": 1.5}),
        (["--threads", "2"], {"threads": 2}),
        (["--adapter-root", "a", "--adapter-root", "b"], {"adapter_root": ["a", "b"]}),
        (["--adapter", "a=/x", "--adapter", "b=y@z"], {"adapters": {"a": "/x", "b": "y@z"}}),
        (["--lora-adapters", "a=/x"], {"adapters": {"a": {"path": "/x", "revision": None}}}),
        (["--num-shard", "1", "--waiting-served-ratio", "0.3", "--max-batch-total-tokens", "9"], {}),
    ],
)
def test_flags_are_read(arguments: list[str], values: dict[str, object]) -> None:
    assert parse(*arguments) == values


def test_tgis_flags_without_a_setting_say_what_becomes_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys)
    for flag in FOREIGN_FLAGS:
        assert f"{flag.name} {flag.metavar} {flag.text}" in text
