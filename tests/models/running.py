"""Loads a model onto one backend's ops and runs one sequence through it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from loraserve.loader import LoadedModel, load_model
from loraserve.models.config import ModelConfig
from loraserve.models.decoder import Decoder
from loraserve.models.ops import EagerOps, KvGeometry
from loraserve.models.weights import BuildDecoder

from tests.batches import BLOCK_SIZE, one_sequence
from tests.ops.stepwise_ops import StepwiseOps
from tests.ops.torch_ops import TorchOps

NUM_PAGES = 16
BACKENDS = {"torch": TorchOps, "cpu": StepwiseOps}


class Running:
    """A loaded float32 model with a small pool of its own."""

    def __init__(self, path: str | Path, backend: str = "torch") -> None:
        self._backend = BACKENDS[backend]
        self.loaded: LoadedModel = load_model(path, torch.float32, self._place)

    def _place(self, config: ModelConfig, build: BuildDecoder) -> tuple[Decoder, int]:
        geometry = KvGeometry(
            config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim, BLOCK_SIZE
        )
        pool = torch.zeros(NUM_PAGES * geometry.page_nbytes(torch.float32), dtype=torch.uint8)
        self.ops: EagerOps = self._backend(geometry, torch.float32, pool)
        return build(self.ops, config.context_limit), config.context_limit

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], num_cached: int = 0, all_logits: bool = True) -> torch.Tensor:
        step = self.ops.begin_step(one_sequence(token_ids, num_cached, all_logits).build())
        return self.loaded.decoder.logits(self.ops, step)

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        tokens = [int(self.logits(prompt, all_logits=False).argmax())]
        while len(tokens) < num_tokens:
            context = len(prompt) + len(tokens) - 1
            tokens.append(int(self.logits(tokens[-1:], num_cached=context).argmax()))
        return tokens
