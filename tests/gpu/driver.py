"""The CUDA driver through ctypes: what tests need of it beside the kernels, on a GPU and on the emulator."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EMULATOR = "LORASERVE_TEST_CUDA_EMULATOR"  # folder with the emulator's libcuda.so.1
NVRTC = "LORASERVE_TEST_NVRTC"  # folder with libnvrtc.so
_CAPTURE_THREAD_LOCAL = 1
_NON_BLOCKING = 1


class DriverError(Exception):
    """A driver call failed."""


class Driver:
    """libcuda with the primary context of device 0 current on the calling thread."""

    def __init__(self, path: str = "libcuda.so.1") -> None:
        # Global, so that whoever asks for libcuda by its name later gets this one.
        self.library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        self.is_emulated = hasattr(self.library, "cuemu_register_range")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *args: object) -> None:
        code = getattr(self.library, name)(*args)
        if code != 0:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(code, ctypes.byref(text))
            raise DriverError(f"{name}: error {code}: {(text.value or b'').decode()}")

    def create_stream(self) -> int:
        stream = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        return int(stream.value or 0)

    def destroy_stream(self, stream: int) -> None:
        self.call("cuStreamDestroy_v2", ctypes.c_void_p(stream))

    def synchronize(self, stream: int) -> None:
        self.call("cuStreamSynchronize", ctypes.c_void_p(stream))

    @contextmanager
    def capture(self, stream: int) -> Iterator["Graph"]:
        """Record what is put on `stream` in the block; the graph can be replayed after it."""
        graph = Graph(self)
        self.call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), _CAPTURE_THREAD_LOCAL)
        try:
            yield graph
        finally:
            recorded = ctypes.c_void_p()
            self.call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(recorded))
        graph.instantiate(recorded)


class Graph:
    """A captured graph."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._executable = ctypes.c_void_p()
        self.num_nodes = 0

    def instantiate(self, recorded: ctypes.c_void_p) -> None:
        num_nodes, flags = ctypes.c_size_t(), ctypes.c_ulonglong(0)
        self._driver.call("cuGraphGetNodes", recorded, None, ctypes.byref(num_nodes))
        self.num_nodes = num_nodes.value
        self._driver.call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), recorded, flags)
        self._driver.call("cuGraphDestroy", recorded)

    def replay(self, stream: int) -> None:
        self._driver.call("cuGraphLaunch", self._executable, ctypes.c_void_p(stream))


def load_libraries() -> None:
    """Load the libraries the environment names, so that their names find them; the order matters."""
    emulator, nvrtc = os.environ.get(EMULATOR), os.environ.get(NVRTC)
    if emulator:
        ctypes.CDLL(str(Path(emulator) / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    if nvrtc:
        # The library opens its builtins by name.
        for pattern in ("libnvrtc-builtins.so.*", "libnvrtc.so.*"):
            libraries = sorted(Path(nvrtc).glob(pattern))
            if not libraries:
                raise FileNotFoundError(f"{NVRTC}={nvrtc} holds no {pattern}")
            ctypes.CDLL(str(libraries[-1]), mode=ctypes.RTLD_GLOBAL)
