"""AdapterSlice: a rank has what the whole adapter has at its rows and columns, whatever their sizes."""

from pathlib import Path

import pytest
import torch
from loraserve import _core
from loraserve.models.config import ModelConfig
from loraserve.models.shard import Shard
from transformers import LlamaConfig

from tests.panels import unpack_panels
from tests.peft_writer import llama_shape, write_adapter

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = {"hidden": 24, "num_heads": 6, "num_kv_heads": 2, "head_dim": 10, "intermediate": 18}
VOCABULARY = 90
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def config() -> ModelConfig:
    return ModelConfig.from_hf(
        LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=VOCABULARY,
            hidden_size=SIZES["hidden"],
            intermediate_size=SIZES["intermediate"],
            num_hidden_layers=2,
            num_attention_heads=SIZES["num_heads"],
            num_key_value_heads=SIZES["num_kv_heads"],
            head_dim=SIZES["head_dim"],
        ).to_dict()
    )


class Packed:
    """An adapter's bytes, and its matrices by layer, group and first column."""

    def __init__(self, layout: _core.AdapterLayout, data: torch.Tensor, dtype: torch.dtype) -> None:
        self.layout = layout
        self.data = data
        self._dtype = dtype

    def matrices(self) -> dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor, float]]:
        """A [rank, in], B [out, rank] and the scale."""
        is_int8 = bool(self.layout.scales())
        dtype = torch.int8 if is_int8 else self._dtype
        found = {}
        for layer, group, a_offset, rank, num_ins, modules in self.layout.groups():
            a = unpack_panels(self._elements(a_offset, dtype), rank, num_ins)
            for first_rank, own_rank, b_offset, out_offset, num_outs, scale in modules:
                first = out_offset % 16
                num_rows = -(-(first + num_outs) // 16) * 16
                b = unpack_panels(self._elements(b_offset, dtype), num_rows, own_rank)
                assert not b[:first].any(), "columns beside the module's"
                assert not b[first + num_outs :].any(), "columns beside the module's"
                own_a = a[first_rank : first_rank + own_rank]
                found[layer, group, out_offset] = own_a, b[first : first + num_outs], scale
        return found

    def _elements(self, offset: int, dtype: torch.dtype) -> torch.Tensor:
        return self.data[offset:].view(dtype)


def aligned(nbytes: int) -> torch.Tensor:
    data = torch.full((nbytes + 64,), 255, dtype=torch.uint8)
    start = -data.data_ptr() % 64
    return data[start : start + nbytes]


@pytest.mark.parametrize(
    ("dtype", "factors"), [("float32", "auto"), ("bfloat16", "auto"), ("float32", "int8")]
)
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_a_part_is_the_wholes_at_its_rows_and_columns(
    tmp_path: Path, dtype: str, factors: str, size: int
) -> None:
    model = config()
    if size == 3:  # which KV heads don't divide
        with pytest.raises(Exception, match="tensor_parallel_size is 3"):
            Shard(0, size).adapter_slice(model, dtype)
        return
    slices = [Shard(rank, size).adapter_slice(model, dtype) for rank in range(size)]
    path = str(write_adapter(tmp_path, llama_shape(2, **SIZES), rank=5, modules=ALL))
    shape = _core.BaseShape(*model.base_shape(), [], (VOCABULARY, SIZES["hidden"]), slices)
    receipt = _core.check_adapter(path, shape, dtype, 64, adapter_dtype=factors)
    whole_data = aligned(receipt.nbytes)
    arguments = (path, shape, dtype, 64, receipt.hash, whole_data.data_ptr(), receipt.nbytes)
    whole = Packed(_core.load_adapter(*arguments, adapter_dtype=factors), whole_data, DTYPES[dtype])
    largest = 0
    for rank, slice_ in enumerate(slices):
        layout = slice_.layout(whole.layout, whole_data.data_ptr())
        layout = _core.AdapterLayout.from_json(layout.to_json())
        data = aligned(layout.nbytes)
        slice_.copy(whole.layout, whole_data.data_ptr(), layout, data.data_ptr(), layout.nbytes)
        part = Packed(layout, data, DTYPES[dtype]).matrices()
        for module in Shard(rank, size).modules(model).values():
            for layer in range(2):
                a, b, scale = whole.matrices()[layer, module.group, module.whole_offset]
                own_a, own_b, own_scale = part[layer, module.group, module.out_offset]
                assert torch.equal(own_a, a[:, module.ins.start : module.ins.stop])
                assert torch.equal(own_b, b[module.outs.start : module.outs.stop])
                assert own_scale == scale
        assert layout.nbytes < receipt.nbytes or size == 1
        largest = max(largest, layout.nbytes)
    assert largest == receipt.extent_nbytes


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        _core.AdapterSlice("float32", [], (0, 20), 10)
    with pytest.raises(ValueError, match="a rank has nothing of a linear"):
        _core.AdapterSlice("float32", [(0, 0, 0, 4, 4, 0, 8, True)], (0, 10), 10)
    with pytest.raises(ValueError, match="dtype is 'int9'"):
        _core.AdapterSlice("int9", [], (0, 10), 10)
    slice_ = _core.AdapterSlice("float32", [], (0, 10), 10)
    layout = _core.AdapterLayout.from_groups([(0, 0, 0, 8, 16, [(0, 8, 512, 0, 16, 1.0)])], 1, 2048)
    data = aligned(layout.nbytes)
    with pytest.raises(ValueError, match="no linear of group 0 begins at column 0"):
        slice_.layout(layout, data.data_ptr())
    with pytest.raises(ValueError, match="no 2048 bytes"):
        slice_.layout(layout, 0)
    with pytest.raises(ValueError, match="are no extent for 2048 bytes"):
        slice_.copy(layout, data.data_ptr(), layout, data.data_ptr(), 100)
    for text in (b"", b"{}", b"[1]", layout.to_json()[:-1]):
        with pytest.raises(ValueError, match="at line 1"):
            _core.AdapterLayout.from_json(text)


def test_a_batch_comes_back_from_its_bytes_and_cut_ones_are_refused() -> None:
    scheduler = _core.Scheduler(
        num_pages=8, page_nbytes=64, block_size=16, max_num_seqs=4, max_batched_tokens=64, max_model_len=64
    )
    scheduler.submit([1, 2, 3], [], 4, 0, [])
    batch = scheduler.schedule().batch
    assert batch is not None
    data = batch.to_bytes()
    again = _core.Batch.from_bytes(data)
    for name, values in batch.arrays().items():
        assert again.arrays()[name].tolist() == values.tolist(), name  # type: ignore[literal-required]
    assert again.to_bytes() == data
    for end in range(len(data)):
        with pytest.raises(ValueError, match="batch"):
            _core.Batch.from_bytes(data[:end])
    with pytest.raises(ValueError, match="bytes after a batch"):
        _core.Batch.from_bytes(data + b"\0")
    with pytest.raises(ValueError, match="end within an array"):
        _core.Batch.from_bytes(b"\xff" * len(data))
