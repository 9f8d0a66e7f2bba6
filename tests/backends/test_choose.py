"""Which device a model runs on, and what is said when the one asked for isn't there."""

import pytest
import torch
from loraserve import LLM
from loraserve.backends import choose_device
from loraserve.errors import DeviceError, InvalidRequestError, ModelError


def has_gpu(monkeypatch: pytest.MonkeyPatch, answer: bool, cuda: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: answer)
    monkeypatch.setattr(torch.version, "cuda", cuda)


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
def test_auto_takes_a_gpu_if_torch_sees_one(
    monkeypatch: pytest.MonkeyPatch, requested: str, gpu: bool, expected: str
) -> None:
    has_gpu(monkeypatch, gpu, "13.0")
    assert choose_device(requested) == expected


@pytest.mark.parametrize(
    ("cuda", "reason"), [(None, "is built without CUDA"), ("13.0", "CUDA 13.0) finds no GPU")]
)
def test_a_missing_gpu_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, reason: str
) -> None:
    has_gpu(monkeypatch, False, cuda)
    with pytest.raises(DeviceError, match=reason.replace(")", r"\)")) as caught:
        choose_device("cuda")
    assert "loraserve doctor" in str(caught.value)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="device is 'tpu', it must be one of auto, cpu, cuda"):
        LLM("smollm2", device="tpu")


def test_float16_is_refused_on_the_cpu(smollm2_path: str) -> None:
    with pytest.raises(
        ModelError, match="dtype is torch.float16, the CPU backend stores float32 or bfloat16"
    ):
        LLM(smollm2_path, device="cpu", dtype="float16", memory="64MiB")
