"""Bytes and operations that SmolLM2-135M in bfloat16 needs at least: what limits are compared with."""

from adapter_files import MODULES, NUM_LAYERS
from workloads import VOCAB_SIZE

HIDDEN = 576
NUM_KV_HEADS, HEAD_DIM = 3, 64
BFLOAT16_NBYTES = 2

LAYER_WEIGHTS = NUM_LAYERS * sum(rows * columns for rows, columns in MODULES.values())
LM_HEAD_WEIGHTS = HIDDEN * VOCAB_SIZE
KV_NBYTES_PER_TOKEN = NUM_LAYERS * 2 * NUM_KV_HEADS * HEAD_DIM * BFLOAT16_NBYTES


def decode_nbytes(contexts: list[int]) -> int:
    """A step that decodes one token of each sequence: every weight once, every sequence's K and V once."""
    weights = BFLOAT16_NBYTES * (LAYER_WEIGHTS + LM_HEAD_WEIGHTS)
    return weights + KV_NBYTES_PER_TOKEN * sum(contexts)


def prefill_flop(num_tokens: int) -> int:
    """One prompt: every linear for each token, causal attention, logits of the last token."""
    linears = 2 * num_tokens * LAYER_WEIGHTS + 2 * LM_HEAD_WEIGHTS
    pairs = num_tokens * (num_tokens + 1) // 2
    return linears + NUM_LAYERS * 4 * HIDDEN * pairs
