"""The LoRA kernels' gains and shifts of columns, y = gain · (y + delta) + weight · shift.

The kernels are compiled and launched here, with a table made by hand.
"""

import ctypes
import struct
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.gpu.device import Gpu
from tests.panels import pack_columns, pack_panels

SOURCES = Path(__file__).parents[2] / "cuda"
HEADERS = ("storage.cuh", "adapter_table.cuh", "lora.cuh")
# As rust/kernels/src/cuda/modules.rs has them: an emulator that ran the product's kernels keeps what it made.
OPTIONS = (b"-std=c++17", b"-default-device", b"-lineinfo", b"-DSTORAGE_BF16", b"-arch=compute_80")
IN_FEATURES, COLUMNS, RANK, CAPACITY = 576, (48, 80), 24, 3
# (source, kernel, threads, blocks of an item) of each phase, as rust/kernels/src/cuda/lora.rs launches them.
LAUNCHES = {
    "decode": [("lora_decode.cu", "lora_decode", 256, 2 + 1)],
    "prefill": [
        ("lora_prefill.cu", "lora_prefill_shrink", 128, 3),
        ("lora_prefill.cu", "lora_prefill_expand", 128, 1),
    ],
}


@cache
def compile_ptx(source: str) -> bytes:
    """PTX of a kernel source for bfloat16, by NVRTC; `gpu` has loaded it, or the library path has it."""
    try:
        nvrtc = ctypes.CDLL("libnvrtc.so.13")
    except OSError:
        nvrtc = ctypes.CDLL("libnvrtc.so.12")
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    names = (ctypes.c_char_p * len(HEADERS))(*(name.encode() for name in HEADERS))
    texts = (ctypes.c_char_p * len(HEADERS))(*((SOURCES / name).read_bytes() for name in HEADERS))
    options = (ctypes.c_char_p * len(OPTIONS))(*OPTIONS)
    text = (SOURCES / source).read_bytes()
    count = len(HEADERS)
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.encode(), count, texts, names) == 0
    assert nvrtc.nvrtcCompileProgram(program, len(options), options) == 0
    assert nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size)) == 0
    ptx = ctypes.create_string_buffer(size.value)
    assert nvrtc.nvrtcGetPTX(program, ptx) == 0
    return ptx.raw


def launch(gpu: Gpu, source: str, kernel: str, threads: int, blocks: int, argument: bytes) -> None:
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    gpu.driver.call("cuModuleLoadData", ctypes.byref(module), compile_ptx(source))
    gpu.driver.call("cuModuleGetFunction", ctypes.byref(function), module, kernel.encode())
    value = ctypes.create_string_buffer(argument, len(argument))
    params = (ctypes.c_void_p * 1)(ctypes.addressof(value))
    shape = (blocks, 1, 1, threads, 1, 1, 0)
    gpu.driver.call("cuLaunchKernel", function, *shape, ctypes.c_void_p(gpu.stream), params, None)


@pytest.mark.parametrize("num_rows", [5, 40])
@pytest.mark.parametrize("phase", LAUNCHES)
def test_gain_scales_and_shift_moves_the_columns_of_its_module(gpu: Gpu, phase: str, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def placed_bytes(data: bytes) -> torch.Tensor:
        return gpu.place(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    a = (random(2 * RANK, IN_FEATURES) / IN_FEATURES**0.5).bfloat16()
    b = [random(columns, RANK).bfloat16() for columns in COLUMNS]
    x, y, gain = (
        random(num_rows, IN_FEATURES).bfloat16(),
        random(num_rows, sum(COLUMNS)).bfloat16(),
        random(80),
    )
    packed_a, packed_b = gpu.place(pack_panels(a)), [gpu.place(pack_panels(each)) for each in b]
    shift = random(48)
    placed_x, placed_y = gpu.place(x), gpu.place(y)
    placed_gain = gpu.place(pack_columns(torch.stack((gain, torch.zeros(80)))))
    placed_shift = gpu.place(pack_columns(torch.stack((torch.ones(48), shift))))
    module = struct.Struct("QQIIIIfI")
    group = struct.pack("QII", packed_a.data_ptr(), 2 * RANK, 2)
    group += module.pack(packed_b[0].data_ptr(), placed_shift.data_ptr(), RANK, 0, 0, 3, 0.5, 0)
    group += module.pack(packed_b[1].data_ptr(), placed_gain.data_ptr(), RANK, RANK, 3, 5, 2.0, 0)
    table = placed_bytes(group.ljust(144, b"\0"))
    # One item of three there is room for; the rest of the list is no item.
    items = placed_bytes(struct.pack("iiif", 0, num_rows, 0, 1.5) + b"\xff" * 16 * (CAPACITY - 1))
    num_items = gpu.place(torch.tensor([1], dtype=torch.int32))
    states = gpu.zeros(CAPACITY * 4, dtype=torch.int32)
    partial_sums = gpu.zeros(3 * num_rows * 2 * RANK, dtype=torch.float32)
    s = gpu.zeros(num_rows * 2 * RANK, dtype=torch.bfloat16)
    s_units = gpu.zeros(num_rows * 3, dtype=torch.float32)
    addresses = table, num_items, items, states, partial_sums, s, s_units, placed_x, placed_y
    argument = struct.pack(
        "QQQQQQQQQIIIIII",
        *(t.data_ptr() for t in addresses),
        *(1, CAPACITY, IN_FEATURES, sum(COLUMNS), num_rows, 2 * RANK),
    )
    for source, kernel, threads, blocks_per_item in LAUNCHES[phase]:
        launch(gpu, source, kernel, threads, CAPACITY * blocks_per_item, argument)
    gpu.synchronize()

    sums = x.float() @ a.float().T * 1.5
    expected = y.float()
    expected[:, :48] += (sums[:, :RANK] * 0.5) @ b[0].float().T
    expected[:, 48:] += (sums[:, RANK:] * 2.0) @ b[1].float().T
    expected[:, 48:] *= gain
    expected[:, :48] += 1.5 * shift
    error = (placed_y.cpu().float() - expected).abs().max() / expected.abs().max()
    assert error < 1.2e-2
    assert not states.cpu().any(), "the next launch finds other than zeros"
