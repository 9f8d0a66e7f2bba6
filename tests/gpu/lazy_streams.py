"""Order between streams, for an emulator that runs work only when something waits for it.

`test_upload.py` runs this file with CUEMU_LAZY=1; by itself it is not collected.
"""

import ctypes

import torch

from tests.gpu.device import Gpu
from tests.gpu.test_upload import DTYPE, GEOMETRY, PAGE_NBYTES, pool_of, random_bytes, upload


def test_a_copy_nobody_waited_for_is_not_there(gpu: Gpu) -> None:
    """What the others rely on: without the wait for its event, a side stream's copy is late."""
    pool, data = pool_of(gpu, 1), random_bytes(PAGE_NBYTES)
    pinned, event, side = ctypes.c_void_p(), ctypes.c_void_p(), gpu.driver.create_stream()
    gpu.driver.call("cuMemAllocHost_v2", ctypes.byref(pinned), ctypes.c_size_t(PAGE_NBYTES))
    gpu.driver.call("cuEventCreate", ctypes.byref(event), 0)
    ctypes.memmove(pinned, data.data_ptr(), PAGE_NBYTES)
    address, nbytes = ctypes.c_ulonglong(pool.data_ptr()), ctypes.c_size_t(PAGE_NBYTES)
    gpu.driver.call("cuMemcpyHtoDAsync_v2", address, pinned, nbytes, ctypes.c_void_p(side))
    gpu.driver.call("cuEventRecord", event, ctypes.c_void_p(side))
    gpu.synchronize()
    assert not pool.any(), "streams are not lazy, these tests would prove nothing"
    gpu.driver.call("cuEventSynchronize", event)
    assert torch.equal(pool, data)
    gpu.driver.call("cuMemFreeHost", pinned)


def test_an_upload_has_waited_for_its_event(gpu: Gpu) -> None:
    pool = pool_of(gpu, (9 << 20) // PAGE_NBYTES)
    kernels = gpu.kernels(GEOMETRY, DTYPE, pool)
    for seed in range(3):
        data = random_bytes(pool.numel(), seed)
        upload(kernels, data, 0)
        assert torch.equal(pool, data)


def test_an_upload_does_not_overtake_the_move_that_makes_room_for_it(gpu: Gpu) -> None:
    pool = pool_of(gpu, 8)
    kernels = gpu.kernels(GEOMETRY, DTYPE, pool)
    moved, loaded = random_bytes(3 * PAGE_NBYTES, 1), random_bytes(3 * PAGE_NBYTES, 2)
    upload(kernels, moved, 0)
    kernels.move_extent(0, 0, 4, 3, gpu.stream)
    upload(kernels, loaded, 0)
    gpu.synchronize()
    assert torch.equal(pool[: 3 * PAGE_NBYTES], loaded)
    assert torch.equal(pool[4 * PAGE_NBYTES : 7 * PAGE_NBYTES], moved)


def test_an_upload_waits_for_those_that_still_read_its_pages(gpu: Gpu) -> None:
    pool, seen = pool_of(gpu, 2), gpu.zeros(PAGE_NBYTES, dtype=torch.uint8)
    kernels = gpu.kernels(GEOMETRY, DTYPE, pool)
    before, after = random_bytes(PAGE_NBYTES, 1), random_bytes(PAGE_NBYTES, 2)
    upload(kernels, before, 0)
    gpu.copy(seen.data_ptr(), pool.data_ptr(), PAGE_NBYTES)  # stands for a kernel that reads the adapter
    kernels.order_uploads(gpu.stream)
    upload(kernels, after, 0)
    gpu.synchronize()
    assert torch.equal(seen, before)
    assert torch.equal(pool[:PAGE_NBYTES], after)


def test_an_upload_that_is_not_ordered_may_overtake(gpu: Gpu) -> None:
    """Why `order_uploads` is there."""
    pool, seen = pool_of(gpu, 2), gpu.zeros(PAGE_NBYTES, dtype=torch.uint8)
    kernels = gpu.kernels(GEOMETRY, DTYPE, pool)
    before, after = random_bytes(PAGE_NBYTES, 1), random_bytes(PAGE_NBYTES, 2)
    upload(kernels, before, 0)
    gpu.copy(seen.data_ptr(), pool.data_ptr(), PAGE_NBYTES)
    upload(kernels, after, 0)
    gpu.synchronize()
    assert torch.equal(seen, after)
