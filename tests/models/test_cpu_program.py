"""The recorded forward pass computes what its ops compute, bit for bit, and refuses what doesn't fit."""

from pathlib import Path

import pytest
import torch
from loraserve import _core
from loraserve.backends.cpu.ops import CpuOps

from tests.batches import one_sequence
from tests.models.running import Running
from tests.models.tiny import MODELS, make_model, save_model


def logits_of(running: Running, tokens: list[int], num_cached: int = 0) -> torch.Tensor:
    """As `Running.logits`, through the program."""
    assert isinstance(running.ops, CpuOps)
    program = running.ops.record(running.loaded.decoder)
    return program.run(running.ops.begin_step(one_sequence(tokens, num_cached, True).build()))


@pytest.mark.parametrize("name", MODELS)
def test_the_program_equals_its_ops(name: str, tmp_path: Path) -> None:
    running = Running(save_model(make_model(name), tmp_path), "cpu")
    tokens = torch.randint(3, 199, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    expected = running.logits(tokens)
    assert torch.equal(logits_of(running, tokens), expected)
    assert torch.equal(logits_of(running, tokens[40:], 40), expected[40:])
    assert torch.equal(logits_of(running, tokens[59:], 59), expected[59:])


def test_a_program_serves_steps_of_any_size_in_any_order(tmp_path: Path) -> None:
    running = Running(save_model(make_model("qwen3"), tmp_path), "cpu")
    assert isinstance(running.ops, CpuOps)
    program = running.ops.record(running.loaded.decoder)
    for length in (1, 90, 7, 33, 120, 2):
        tokens = list(range(3, 3 + length))
        found = program.run(running.ops.begin_step(one_sequence(tokens, 0, True).build()))
        assert torch.equal(found, running.logits(tokens))


def test_a_step_of_other_kernels_is_refused(tmp_path: Path) -> None:
    path = save_model(make_model("llama"), tmp_path)
    mine, other = Running(path, "cpu"), Running(path, "cpu")
    assert isinstance(mine.ops, CpuOps)
    program = mine.ops.record(mine.loaded.decoder)
    with pytest.raises(ValueError, match="begun by other kernels"):
        program.run(other.ops.begin_step(one_sequence([3, 4], 0, True).build()))


def test_what_does_not_fit_is_refused_when_it_is_recorded(tmp_path: Path) -> None:
    running = Running(save_model(make_model("llama"), tmp_path), "cpu")
    decoder = running.loaded.decoder
    layer, norm = decoder.layers[0], decoder.layers[0].attn_norm
    recording, other = _core.CpuRecording(), _core.CpuRecording()
    rows = recording.embedding(decoder.lm_head)
    with pytest.raises(ValueError, match="only norms take it"):
        recording.lora_linear(rows, layer.qkv, 0, 0)
    hidden = recording.rms_norm(rows, None, norm.data_ptr(), 64, 1e-6)
    other.embedding(layer.down)
    with pytest.raises(ValueError, match="recorded elsewhere"):
        other.silu_mul(hidden)
    with pytest.raises(ValueError, match="x's features has length 64, expected 96"):
        recording.lora_linear(hidden, layer.down, 0, 3)
    with pytest.raises(ValueError, match="norm weight has length 32"):
        recording.rms_norm(hidden, None, norm.data_ptr(), 32, 1e-6)
    with pytest.raises(ValueError, match="can't be its residual"):
        recording.rms_norm(hidden, hidden, norm.data_ptr(), 64, 1e-6)
    qkv = recording.lora_linear(hidden, layer.qkv, 0, 0)
    with pytest.raises(ValueError, match="residual's features"):
        recording.rms_norm(hidden, qkv, norm.data_ptr(), 64, 1e-6)
    with pytest.raises(ValueError, match="hidden's features"):
        recording.logits(kernels_of(running), qkv, decoder.lm_head)


def test_an_ended_recording_takes_no_more(tmp_path: Path) -> None:
    running = Running(save_model(make_model("llama"), tmp_path), "cpu")
    head = running.loaded.decoder.lm_head
    recording = _core.CpuRecording()
    norm = running.loaded.decoder.layers[0].attn_norm
    hidden = recording.rms_norm(recording.embedding(head), None, norm.data_ptr(), 64, 1e-6)
    recording.logits(kernels_of(running), hidden, head)
    with pytest.raises(ValueError, match="recording has ended"):
        recording.embedding(head)


def test_constants_of_another_dtype_are_refused(tmp_path: Path) -> None:
    running = Running(save_model(make_model("llama"), tmp_path), "cpu")
    decoder = running.loaded.decoder
    assert isinstance(running.ops, CpuOps)
    decoder.layers[0] = decoder.layers[0].__class__(
        **{**vars(decoder.layers[0]), "attn_norm": decoder.layers[0].attn_norm.double()}
    )
    with pytest.raises(ValueError, match=r"a constant is torch.float64 \(64,\)"):
        running.ops.record(decoder)


def kernels_of(running: Running) -> _core.CpuKernels:
    assert isinstance(running.ops, CpuOps)
    return running.ops._kernels
