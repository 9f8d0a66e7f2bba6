"""`loraserve doctor` says what there is, what is missing, and what to do about it."""

import subprocess
import sys
from typing import Any

import pytest
from loraserve import _core
from loraserve.backends import why_no_cuda
from loraserve.cli import main
from loraserve.cli.doctor import report

NOTHING = {
    "driver": None,
    "driver_error": "no driver, install one",
    "devices": [],
    "nvrtc": None,
    "nvrtc_path": None,
    "nvrtc_error": "no NVRTC, install it",
    "kernel_cache": None,
}
GPU: dict[str, Any] = {
    "driver": "13.0",
    "driver_error": None,
    "devices": [
        {
            "name": "NVIDIA L4",
            "capability": (8, 9),
            "num_sms": 58,
            "total_nbytes": 24 * 2**30,
            "free_nbytes": 23 * 2**30,
            "error": None,
            "target": "sm_89",
            "target_error": None,
        }
    ],
    "nvrtc": "13.2",
    "nvrtc_path": "/lib/libnvrtc.so.13",
    "nvrtc_error": None,
    "kernel_cache": "/cache",
}


def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], facts: dict[str, Any]
) -> dict[str, str]:
    monkeypatch.setattr(_core, "cuda_facts", lambda: facts)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {label: value for label, value in (line.split("  ", 1) for line in lines)}


def test_what_is_missing_is_said_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {label: value.strip() for label, value in printed(monkeypatch, capsys, NOTHING).items()}
    assert rows["CUDA driver"] == "none: no driver, install one"
    assert rows["NVRTC"] == "none: no NVRTC, install it"
    assert rows["kernel cache"].startswith("none")
    assert "GPU 0" not in rows


def test_a_gpu_is_named_with_its_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {label: value.strip() for label, value in printed(monkeypatch, capsys, GPU).items()}
    assert rows["GPU 0"] == "NVIDIA L4, sm_89, 58 SMs, 23.0 of 24.0 GiB free"
    assert rows["kernel cache"] == "/cache"


def test_the_compiler_is_named_with_its_file_and_what_it_makes_for_which_driver(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {label: value.strip() for label, value in printed(monkeypatch, capsys, GPU).items()}
    assert rows["NVRTC"] == "13.2, /lib/libnvrtc.so.13"
    assert rows["GPU 0 code"] == "machine code (sm_89) by NVRTC 13.2 for a driver of CUDA 13.0"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"target": "compute_86"}, "PTX (compute_86) by NVRTC 13.2 for a driver of CUDA 13.0"),
        ({"target": None, "target_error": "too old"}, "none: too old"),
        ({"target": None, "error": "no Ampere", "free_nbytes": None}, "none: no Ampere"),
    ],
)
def test_a_gpu_for_which_nothing_can_be_compiled_is_told_why(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: dict[str, Any],
    expected: str,
) -> None:
    facts = GPU | {"devices": [GPU["devices"][0] | found]}
    rows = {label: value.strip() for label, value in printed(monkeypatch, capsys, facts).items()}
    assert rows["GPU 0 code"] == expected


def test_this_machine_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"{_core.default_isa()} kernels" in out
    assert f"cpu: {reason}" in out if (reason := why_no_cuda()) else "cuda" in out


def test_it_runs_where_packages_are_missing() -> None:
    absent = [
        "torch",
        "pydantic",
        "fastapi",
        "uvicorn",
        "orjson",
        "llguidance",
        "grpc",
        "grpc_health",
        "jinja2",
        "yaml",
    ]
    hide = "".join(f"sys.modules[{name!r}] = None; " for name in absent)
    code = f"import sys; {hide}from loraserve.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "none: import of torch halted" in done.stdout


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    required = ["torch>=2.4", "a-package-nobody-has>=1,<2", 'nor-this ; extra == "dev"']
    monkeypatch.setattr("importlib.metadata.requires", lambda _: required)
    assert main(["doctor"]) == 0
    assert "missing: a-package-nobody-has; install" in capsys.readouterr().out


def test_the_cache_of_quantised_weights_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASERVE_CACHE_DIR", "/cache")
    assert report()["weight cache"] == "/cache/quantized"
    for name in ("LORASERVE_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    assert report()["weight cache"].startswith("none: no home folder")
