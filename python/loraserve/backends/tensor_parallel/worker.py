"""A rank's process: it loads its part of the model, and computes what rank 0 says until that ends.

Commands come over one channel and are done in their order; adapters come over another, and go straight to
their extents once the commands before them are done.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from loraserve import _core
from loraserve.backends.base import Extent, StepRows
from loraserve.backends.cpu.backend import CpuBackend
from loraserve.backends.cpu.program import RankPart
from loraserve.backends.tensor_parallel.channel import Channel, Message
from loraserve.backends.tensor_parallel.group import Group, LostRankError
from loraserve.backends.tensor_parallel.ranks import LoadHead, RankStart
from loraserve.config import EngineConfig
from loraserve.loader.packed_weights import packed_weights
from loraserve.loader.resolve import open_checkpoint
from loraserve.models.ops import KvGeometry
from loraserve.models.shard import Shard, ShardedWeights
from loraserve.models.weights import build_decoder

if TYPE_CHECKING:
    from loraserve.models.decoder import Decoder

SEND_LIMIT_S = 60.0


def main() -> None:
    """Called with the descriptors of the ends of two socket pairs."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they are sent to the whole group; rank 0 decides
    torch.set_num_threads(1)
    commands, loads = (Channel(socket.socket(fileno=int(number)), None) for number in sys.argv[1:3])
    status = 1
    try:
        kind, data = commands.receive()
        assert kind is Message.START, "invariant: rank 0 begins so"
        worker = Worker(RankStart(**json.loads(data)), loads)
        commands.send(Message.READY)
        worker.run(commands)
        status = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        status = 0  # rank 0 is gone
    except LostRankError:
        _wait_for_the_end(commands)
    except BaseException as error:
        _say_why(commands, error)
    os._exit(status)  # the other thread may wait in the middle of C


def _say_why(commands: Channel, error: BaseException) -> None:
    with suppress(OSError):
        commands.send(Message.FAILED, f"{type(error).__name__}: {error}".encode())
    traceback.print_exception(error)


def _wait_for_the_end(commands: Channel) -> None:
    """Rank 0 finds out, too, and which rank it was; to end before would look as if it were this one."""
    with suppress(EOFError, OSError):
        while True:
            commands.receive()


class Worker:
    """One rank of several, but not the first.

    Args:
        start: what it loads.
        loads: where adapters come from; read on a thread of its own once `run` is called.

    Raises:
        LoraserveError: the part can't be loaded.
    """

    def __init__(self, start: RankStart, loads: Channel) -> None:
        self._start = start
        self._loads = loads
        self._group = Group(start.rank, start.size, start.timeout_s)
        self._layouts: dict[int, _core.AdapterLayout] = {}  # of what was loaded last, by slot
        self._done = threading.Condition()
        self._num_done = 0  # commands
        self._rows: StepRows | None = None  # of the last step, where it gave rows out
        self._backend, self._decoder = self._load()

    def _load(self) -> tuple[CpuBackend, Decoder]:
        start = self._start
        dtype: torch.dtype = getattr(torch, start.dtype)
        config = EngineConfig(
            model=start.model, dtype=start.dtype, device="cpu", num_threads=start.num_threads
        )
        shard = Shard(start.rank, start.size)
        with open_checkpoint(start.model) as checkpoint:
            whole = checkpoint.config
            own = shard.config_of(whole)
            tokens = shard.tokens(whole.vocab_size)
            part = RankPart(tokens.start, tokens.stop == whole.vocab_size, self._group.all_reduce)
            backend = CpuBackend(config, dtype, part)
            geometry = KvGeometry(own.num_layers, own.num_heads, own.num_kv_heads, own.head_dim)
            backend.allocate(geometry, start.num_pages)
            dense, _ = packed_weights(checkpoint, None, None, keeps_quantized=False)
            weights = ShardedWeights(dense, whole, shard)
            decoder = build_decoder(own, weights, backend.ops, dtype, start.num_positions)
        return backend, decoder

    def run(self, commands: Channel) -> None:
        """Do what comes, until EOFError says that rank 0 is gone."""
        self._group.connect(self._start.meeting)
        self._backend.start()
        threading.Thread(target=self._take_loads, args=(commands,), daemon=True).start()
        while True:
            kind, data = commands.receive()
            self._do(kind, data)
            with self._done:
                self._num_done += 1
                self._done.notify_all()

    def _do(self, kind: Message, data: bytearray) -> None:
        if kind is Message.STEP:
            self._step(_core.Batch.from_bytes(bytes(data)))
            return
        arguments = json.loads(data)
        if kind is Message.LOGITS:
            assert self._rows is not None, "invariant: rank 0 asks for rows of the step before"
            self._send(self._rows.logits_of(*arguments))
        elif kind is Message.MOVE:
            self._backend.ops.move_extent(*arguments)
        elif kind is Message.BIND:
            slot, first_page = arguments
            self._backend.ops.set_adapter(slot, first_page, self._layouts[slot])
        else:
            raise AssertionError(f"invariant: no command is {kind.name}")

    @torch.inference_mode()
    def _step(self, batch: _core.Batch) -> None:
        self._rows = None
        if batch.num_hidden:
            self._rows = self._backend.rows(self._decoder, batch)
            self._send(self._rows.logits)
        else:
            self._send(self._backend.logits(self._decoder, batch))

    def _send(self, logits: torch.Tensor) -> None:
        if logits.numel():
            self._group.send(logits, 0)

    def _take_loads(self, commands: Channel) -> None:
        try:
            while True:
                kind, data = self._loads.receive()
                if kind is Message.LOAD:
                    self._load_adapter(LoadHead(**json.loads(data)))
                self._loads.send(Message.DONE)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            os._exit(0)  # rank 0 is gone, whatever the other thread waits for
        except BaseException as error:
            _say_why(commands, error)
            os._exit(1)

    def _load_adapter(self, head: LoadHead) -> None:
        layout = _core.AdapterLayout.from_json(bytes(self._loads.receive()[1]))
        with self._done:
            self._done.wait_for(lambda: self._num_done >= head.fence)
        address = self._backend.address(Extent(head.slot, head.first_page, head.nbytes))
        first = address - self._backend.pool.data_ptr()
        self._loads.receive_into(self._backend.pool.numpy().data[first : first + head.nbytes])
        self._layouts[head.slot] = layout
