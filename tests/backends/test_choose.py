"""Which device a model runs on, and what is said when the one asked for isn't there."""

from pathlib import Path

import pytest
import torch
from loraserve import LLM, _core
from loraserve.backends import choose_device
from loraserve.backends.choose import MIN_TORCH
from loraserve.errors import DeviceError, InvalidRequestError, ModelError
from torch.torch_version import TorchVersion

T4 = "Tesla T4 has compute capability 7.5, 8.0 (Ampere) or newer is needed"


def has_gpu(
    monkeypatch: pytest.MonkeyPatch, answer: bool, cuda: str | None, unfit: str | None = None
) -> None:
    """A torch for `cuda`; `unfit` is what the kernels miss."""

    def check_cuda(device: int = 0) -> None:
        if unfit is not None:
            raise DeviceError(unfit)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: answer)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(_core, "check_cuda", check_cuda)


@pytest.mark.parametrize(
    ("requested", "gpu", "expected"),
    [
        ("cpu", True, "cpu"),
        ("cpu", False, "cpu"),
        ("auto", True, "cuda"),
        ("auto", False, "cpu"),
        ("cuda", True, "cuda"),
    ],
)
def test_auto_takes_a_gpu_that_can_run_the_kernels(
    monkeypatch: pytest.MonkeyPatch, requested: str, gpu: bool, expected: str
) -> None:
    has_gpu(monkeypatch, gpu, "13.0")
    assert choose_device(requested) == expected


def test_auto_passes_over_a_gpu_that_can_not_run_the_kernels_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    has_gpu(monkeypatch, True, "13.0", T4)
    assert choose_device("auto") == "cpu"
    assert [record.getMessage() for record in caplog.records] == [
        f"the model runs on the CPU, though there is a GPU: {T4}"
    ]
    with pytest.raises(DeviceError, match='device is "cuda", Tesla T4 has compute capability 7.5'):
        choose_device("cuda")


def test_float32_runs_on_the_cpu_unless_a_gpu_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    has_gpu(monkeypatch, True, "13.0")
    assert choose_device("auto", "float32") == "cpu"
    assert 'dtype is "float32", GPUs store "bfloat16" or "float16"' in caplog.text
    with pytest.raises(DeviceError, match='dtype is "float32"'):
        choose_device("cuda", "float32")
    assert choose_device("cuda", "float16") == "cuda"


def test_a_torch_before_the_first_that_pyproject_allows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the GPU's kernels need of torch is what the package requires, and the README says so."""
    has_gpu(monkeypatch, True, "12.4")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.7.1+cu124"))
    with pytest.raises(DeviceError, match=r"torch is 2.7.1\+cu124, 2.8 or newer is needed"):
        choose_device("cuda")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.10.0+cu124"))
    assert choose_device("cuda") == "cuda"
    root = Path(__file__).parents[2]
    assert f'"torch>={MIN_TORCH}"' in (root / "pyproject.toml").read_text()
    assert f"torch ≥ {MIN_TORCH}" in (root / "README.md").read_text()


@pytest.mark.parametrize(
    ("cuda", "reason"), [(None, "is built without CUDA"), ("13.0", "CUDA 13.0) finds no GPU")]
)
def test_a_missing_gpu_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cuda: str | None, reason: str
) -> None:
    has_gpu(monkeypatch, False, cuda)
    with pytest.raises(DeviceError, match=reason.replace(")", r"\)")) as caught:
        choose_device("cuda")
    assert "loraserve doctor" in str(caught.value)
    assert choose_device("auto") == "cpu"
    assert not caplog.records, "without a GPU there is nothing to warn of"


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="device is 'tpu', it must be one of auto, cpu, cuda"):
        LLM("smollm2", device="tpu")


def test_float16_is_refused_on_the_cpu(smollm2_path: str) -> None:
    with pytest.raises(
        ModelError, match="dtype is torch.float16, the CPU backend stores float32 or bfloat16"
    ):
        LLM(smollm2_path, device="cpu", dtype="float16", memory="64MiB")
