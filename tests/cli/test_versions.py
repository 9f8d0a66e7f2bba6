"""`loraserve adapters history`, `share` and `rollback` against a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from loraserve.cli.main import main

from tests.e2e.test_shadow import wait_for
from tests.e2e.test_state_dir import serving


@pytest.fixture
def http(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str], tmp_path: Path
) -> Iterator[httpx.Client]:
    keys = tmp_path / "keys.yaml"
    keys.write_text("- {name: root, secret: of-root, admin: true}\n- {name: one, secret: of-one}\n")
    options = ["--adapter", f"sql={tiny_adapters['a0']}", "--keys-file", str(keys)]
    with serving(tiny_model[0], *options, "--adapter-root", str(Path(tiny_adapters["a1"]).parent)) as (
        http,
        _,
    ):
        http.headers["authorization"] = "Bearer of-root"
        body = {"name": "sql", "source": tiny_adapters["a1"], "replace": True}
        assert http.post("/adapters", json=body).status_code == 201
        yield http


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOT_KEY", "of-root")
    monkeypatch.setenv("ONE_KEY", "of-one")


def run(capsys: pytest.CaptureFixture[str], http: httpx.Client, *words: str, key: str = "ROOT_KEY") -> str:
    """What is printed; what went wrong begins with an exclamation mark."""
    status = main(["adapters", *words, "--url", str(http.base_url), "--api-key-env", key])
    shown = capsys.readouterr()
    return shown.out if status == 0 else f"!{shown.err}"


def column(text: str, number: int) -> list[str]:
    return [line.replace(" *", "*").split()[number] for line in text.splitlines()[1:]]


def test_generations_are_shown_shared_and_gone_back_to(
    http: httpx.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = run(capsys, http, "history", "sql")
    assert shown.split()[:7] == ["generation", "share", "requests", "kept", "published", "hash", "source"]
    assert (column(shown, 0), column(shown, 1)) == (["1", "2*"], ["-", "100.00%"])
    shown = run(capsys, http, "share", "sql", "1=0.75", "2=0.25")
    assert column(shown, 1) == ["75.00%", "25.00%"]
    assert column(run(capsys, http, "rollback", "sql"), 1) == ["-", "100.00%"]
    assert "is at generation 2, 1 was expected" in run(capsys, http, "rollback", "sql", "--expected", "1")
    assert column(run(capsys, http, "rollback", "sql", "1", "--expected", "2"), 0) == ["1*", "2"]


def test_a_shadow_is_begun_shown_and_ended(http: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, http, "shadow", "sql", "1", "--fraction", "1")
    told = "generation 1 is a shadow of 100.00% of requests: 0 compared, 0 errors, 0 dropped"
    assert shown.splitlines()[-1] == told
    body = {"model": "sql", "prompt": [1, 2, 3], "max_tokens": 3, "temperature": 0}
    assert http.post("/v1/completions", json=body).headers["x-adapter-generation"] == "2"
    wait_for(lambda: " 0 compared" not in run(capsys, http, "history", "sql"))
    line = run(capsys, http, "history", "sql").splitlines()[-1]
    assert line.startswith("generation 1 is a shadow of 100.00% of requests: 1 compared, ")
    assert line.endswith("ending alike, 3.0 tokens and 3.0 of copies, 0 errors, 0 dropped")
    assert "generation 1 was a shadow: 1 compared" in run(capsys, http, "shadow", "sql", "--off")
    assert "has no shadow (status 404)" in run(capsys, http, "shadow", "sql", "--off")
    for words, text in (
        (("sql", "1", "--off"), "leave GENERATION and --fraction out"),
        (("sql",), "give the GENERATION"),
        (("sql", "2"), "generation 2 of adapter 'sql' answers requests"),
        (("sql", "1", "--fraction", "2"), "fraction"),
    ):
        assert text in run(capsys, http, "shadow", *words)
    assert "(status 403)" in run(capsys, http, "shadow", "sql", "1", key="ONE_KEY")
    assert "shadow" not in run(capsys, http, "history", "sql", key="ONE_KEY")


def test_errors_are_told_in_a_line(http: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in (
        (("history", "none"), "'none' is not registered"),
        (("share", "sql", "1=0.5"), "sum to 0.5"),
        (("share", "sql", "1=0.5", "1=0.5"), "given twice"),
        (("rollback", "sql", "9"), "no generation 9"),
    ):
        told = run(capsys, http, *words)
        assert told.startswith("!loraserve: error: ")
        assert text in told
        assert told.count("\n") == 1
    assert "(status 403)" in run(capsys, http, "rollback", "sql", key="ONE_KEY")
    assert column(run(capsys, http, "history", "sql", key="ONE_KEY"), 2) == ["?", "?"]
    assert "UNSET_KEY is not set" in run(capsys, http, "history", "sql", key="UNSET_KEY")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "ftp://x", "http://[", "http://a b"])
def test_a_server_that_is_not_there_is_told(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "history", "sql", "--url", url]) == 1
    assert url in capsys.readouterr().err


def test_shares_are_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["adapters", "share", "sql", "1:0.5"])
    assert "'1:0.5' is no GENERATION=SHARE, such as 3=0.05" in capsys.readouterr().err
