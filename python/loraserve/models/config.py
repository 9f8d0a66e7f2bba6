"""ModelConfig: the checked shape of a base model, read from a Hugging Face config.json dict."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from loraserve.errors import ModelError
from loraserve.models.ops import DOWN, GATE_UP, QKV, O
from loraserve.models.registry import CLASSIFIES, find_architecture
from loraserve.models.rope import RopeConfig
from loraserve.validation.values import token_ids

# (path inside the layer, LoRA group, in_features, out_features, first column in the group's fused output)
ModuleShape: TypeAlias = tuple[str, int, int, int, int]

MAX_SIZE = 2**31 - 1  # sizes are 32-bit integers in the kernels' arrays
MAX_HEAD_DIM = 512  # the kernels' own, as is the next
MAX_LAYERS = MAX_HEADS = 2**16
MAX_FLOAT = sys.float_info.max

FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the decoder needs to know of a model; sizes in elements, `max_position` in tokens."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @staticmethod
    def from_hf(config: Mapping[str, Any], rope_factors: Sequence[float] = ()) -> "ModelConfig":
        """Read a config.json dict as transformers reads it; `rope_factors` divide the rotary frequencies.

        Fields that transformers does not read for this architecture are not read here either.
        Raises ModelError naming the first field we can't serve.
        """
        name, architecture = find_architecture(config)
        fields = _Fields(config, architecture.defaults)
        _refuse_unsupported(config, fields)
        hidden_size, num_heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
        head_dim = fields.optional_positive("head_dim") or hidden_size // num_heads
        _check_head_dim(head_dim)
        max_position = fields.positive("max_position_embeddings")
        attention_bias, mlp_bias = fields.boolean("attention_bias"), fields.boolean("mlp_bias")
        model = ModelConfig(
            architecture=name,
            num_layers=fields.positive("num_hidden_layers"),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=fields.optional_positive("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            intermediate_size=fields.positive("intermediate_size"),
            vocab_size=fields.positive("vocab_size"),
            max_position=max_position,
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope=RopeConfig.from_hf(config, head_dim, max_position, rope_factors),
            tie_word_embeddings=fields.boolean("tie_word_embeddings"),
            qkv_bias=attention_bias if architecture.qkv_bias is None else architecture.qkv_bias,
            o_bias=attention_bias if architecture.o_bias is None else architecture.o_bias,
            mlp_bias=mlp_bias if architecture.mlp_bias is None else architecture.mlp_bias,
            qk_norm=architecture.qk_norm,
            sliding_window=_sliding_window(fields, uses_window_fields=architecture.uses_window_fields),
            bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
            eos_token_ids=fields.token_ids("eos_token_id"),
        )
        model._check_heads()
        return model

    def _check_heads(self) -> None:
        if self.num_layers > MAX_LAYERS or self.num_heads > MAX_HEADS:
            raise ModelError(
                f"num_hidden_layers {self.num_layers} or num_attention_heads {self.num_heads} is not "
                f"supported, the limits are {MAX_LAYERS} and {MAX_HEADS}"
            )
        if self.num_heads % self.num_kv_heads != 0:
            raise ModelError(
                f"num_attention_heads {self.num_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )

    @property
    def is_classifier(self) -> bool:
        """Whether it has a head for labels in place of the one for tokens."""
        return self.architecture.endswith(CLASSIFIES)

    @property
    def q_size(self) -> int:
        """Columns of the queries of all heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the keys of all KV heads, or of their values."""
        return self.num_kv_heads * self.head_dim

    @property
    def context_limit(self) -> int:
        """Longest sequence served, in tokens: the trained positions, or the sliding window if that is
        shorter (attention here is full, which equals windowed attention only inside the window)."""
        return min(self.max_position, self.sliding_window or self.max_position)

    def resolve_max_model_len(self, requested: int | None) -> int:
        """The sequence length to serve: `requested`, or the context limit when None. Raises ModelError."""
        if requested is None:
            return self.context_limit
        if requested < 1:
            raise ModelError(f"max_model_len is {requested}, it must be at least 1")
        if requested > self.context_limit:
            windowed = self.context_limit < self.max_position
            reason = "its sliding_window" if windowed else "its max_position_embeddings"
            raise ModelError(f"max_model_len {requested} exceeds the model's {self.context_limit} ({reason})")
        return requested

    def base_shape(self) -> tuple[int, list[ModuleShape]]:
        """Arguments of `_core.BaseShape`: the number of layers and every module LoRA can attach to."""
        hidden, inter, q, kv = self.hidden_size, self.intermediate_size, self.q_size, self.kv_size
        return self.num_layers, [
            ("self_attn.q_proj", QKV, hidden, q, 0),
            ("self_attn.k_proj", QKV, hidden, kv, q),
            ("self_attn.v_proj", QKV, hidden, kv, q + kv),
            ("self_attn.o_proj", O, q, hidden, 0),
            ("mlp.gate_proj", GATE_UP, hidden, inter, 0),
            ("mlp.up_proj", GATE_UP, hidden, inter, inter),
            ("mlp.down_proj", DOWN, inter, hidden, 0),
        ]

    @property
    def biased_modules(self) -> list[str]:
        """Paths of `base_shape` of the linears that have a bias."""
        groups = {QKV: self.qkv_bias, O: self.o_bias, GATE_UP: self.mlp_bias, DOWN: self.mlp_bias}
        return [path for path, group, *_ in self.base_shape()[1] if groups[group]]


class _Fields:
    """Typed reads of a config.json; a field left out has its architecture's default."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._values = {**defaults, **config}

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def positive(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
            raise ModelError(
                f"config has {key} {value!r:.100}, it must be a positive integer up to {MAX_SIZE}"
            )
        return value

    def optional_positive(self, key: str) -> int | None:
        return None if self.get(key) is None else self.positive(key)

    def count(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ModelError(f"config has {key} {value!r:.100}, it must be an integer of 0 or more")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= MAX_FLOAT:
            raise ModelError(f"config has {key} {value!r:.100}, it must be a number of 0 or more")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise ModelError(f"config has {key} {value!r:.100}, it must be true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        try:
            return token_ids(self.get(key))
        except TypeError:
            raise ModelError(
                f"config has {key} {self.get(key)!r:.100}, it must be an integer or a list of integers"
            ) from None


def _check_head_dim(head_dim: int) -> None:
    if head_dim % 2 != 0:
        raise ModelError(f"head_dim {head_dim} is odd, rotary embedding needs an even one")
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise ModelError(f"head_dim {head_dim} is not supported, it must be from 2 to {MAX_HEAD_DIM}")


def _sliding_window(fields: _Fields, *, uses_window_fields: bool) -> int | None:
    """The window of the layers whose attention slides, None if there are none."""
    window, num_layers = fields.optional_positive("sliding_window"), fields.positive("num_hidden_layers")
    types = fields.get("layer_types")
    if types is not None:
        known = isinstance(types, list) and all(kind in (FULL_ATTENTION, SLIDING_ATTENTION) for kind in types)
        if not known or len(types) != num_layers:
            raise ModelError(
                f"config has layer_types {types!r:.200}, each of {num_layers} layers must have "
                f"{FULL_ATTENTION} or {SLIDING_ATTENTION}"
            )
    if uses_window_fields and not fields.boolean("use_sliding_window"):
        window = None
    if types is None:
        first = fields.count("max_window_layers") if uses_window_fields else 0
        return window if first < num_layers else None
    if SLIDING_ATTENTION in types and window is None:
        raise ModelError(f"layer_types has {SLIDING_ATTENTION}, but sliding_window is not set or not used")
    return window if SLIDING_ATTENTION in types else None


def _refuse_unsupported(config: Mapping[str, Any], fields: _Fields) -> None:
    activation = fields.get("hidden_act")
    if activation not in ("silu", "swish"):
        raise ModelError(f"hidden_act {activation!r:.100} is not supported, it must be silu")
    if config.get("per_layer_config") is not None:
        raise ModelError("per_layer_config is not supported, all layers must have the same shape")
