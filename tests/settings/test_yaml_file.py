"""YAML of settings: strict, and within bounds whatever its aliases stand for."""

import os
import threading
from pathlib import Path

import pytest
from loraserve.settings.errors import ConfigError
from loraserve.settings.load import load_settings
from loraserve.settings.yaml_file import MAX_NBYTES, MAX_VALUES, read_yaml

LEVELS = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"a0: &a0 [x]\n{LEVELS}", f"more than {MAX_VALUES} values, aliases counted"),
        ("a: &a [*a]", "an alias stands within what it stands for"),
        ("a: &a {b: *a}", "an alias stands within what it stands for"),
        ("a: " + "[" * 150 + "]" * 150, "nested deeper than 100"),
        ("a: 0x" + "f" * 5000, "integer of more than 100 characters"),
        ("a: 1\nb: 2\na: 3", "'a' is given twice"),
        ("a: [", "is not YAML"),
        ("a: " + "x" * MAX_NBYTES, f"has more than {MAX_NBYTES} bytes"),
    ],
    ids=["aliases", "itself", "itself_in_object", "deep", "long_integer", "twice", "cut", "large"],
)
def test_what_would_become_too_much_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


def test_aliases_and_merges_are_read(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("a: &a {x: 1, y: 0x10}\nb: *a\nc: {<<: *a, x: 2}\n")
    assert read_yaml(path) == {"a": {"x": 1, "y": 16}, "b": {"x": 1, "y": 16}, "c": {"x": 2, "y": 16}}


def test_a_pipe_is_read_as_a_shell_gives_one(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_text("model: m"))
    writer.start()
    assert read_yaml(path) == {"model": "m"}
    writer.join()


@pytest.mark.parametrize(
    "origins", ["[[https://a.example]]", '"' + "[" * 100_000 + '"', '["[1", "[2]"]', '"[1]"']
)
def test_origins_that_are_no_list_of_texts_are_refused(origins: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(f"model: m\ncors_origin: {origins}")
    with pytest.raises(ConfigError, match="cors_origin"):
        load_settings({}, {}, path)


@pytest.mark.parametrize(("written", "meant"), [("off", "off"), ("'off'", "off"), ("ngram", "ngram")])
def test_guessing_is_turned_off_by_a_bare_off(written: str, meant: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(f"model: m\nspeculate: {written}")
    assert load_settings({}, {}, path).settings.speculate == meant
