"""ModelConfig: the checked shape of a base model, read from a Hugging Face config.json dict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from loraserve.errors import ModelError
from loraserve.models.registry import find_architecture
from loraserve.ops.base import DOWN, GATE_UP, QKV, O

# (path inside the layer, LoRA group, in_features, out_features, first column in the group's fused output)
ModuleShape: TypeAlias = tuple[str, int, int, int, int]

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "factors")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base wavelength, kind of context scaling, and that kind's own parameters."""

    theta: float = 10000.0
    kind: str = "default"
    params: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_hf(config: Mapping[str, Any]) -> "RopeConfig":
        params = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        kind = params.pop("rope_type", None) or params.pop("type", None) or "default"
        if kind not in ROPE_KINDS:
            raise ModelError(f"rope scaling {kind!r} is not supported, supported are {', '.join(ROPE_KINDS)}")
        theta = params.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
        rotary_factor = params.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
        if rotary_factor != 1.0:
            raise ModelError(f"partial_rotary_factor {rotary_factor} is not supported, it must be 1")
        params.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
        return RopeConfig(float(theta), kind, params)


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
    def from_hf(config: Mapping[str, Any]) -> "ModelConfig":
        """Check a config.json dict. Raises ModelError naming the first field we can't serve."""
        name, architecture = find_architecture(config)
        _refuse_unsupported(config)
        hidden_size = _positive(config, "hidden_size")
        num_heads = _positive(config, "num_attention_heads")
        attention_bias = bool(config.get("attention_bias", False))
        mlp_bias = bool(config.get("mlp_bias", False))
        model = ModelConfig(
            architecture=name,
            num_layers=_positive(config, "num_hidden_layers"),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=_positive(config, "num_key_value_heads", num_heads),
            head_dim=_positive(config, "head_dim", hidden_size // num_heads),
            intermediate_size=_positive(config, "intermediate_size"),
            vocab_size=_positive(config, "vocab_size"),
            max_position=_positive(config, "max_position_embeddings"),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=RopeConfig.from_hf(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias if architecture.qkv_bias is None else architecture.qkv_bias,
            o_bias=attention_bias if architecture.o_bias is None else architecture.o_bias,
            mlp_bias=mlp_bias if architecture.mlp_bias is None else architecture.mlp_bias,
            qk_norm=architecture.qk_norm,
            sliding_window=_sliding_window(config),
            bos_token_id=_first_id(config.get("bos_token_id")),
            eos_token_ids=token_ids(config.get("eos_token_id")),
        )
        model._check_heads()
        return model

    def _check_heads(self) -> None:
        if self.num_heads % self.num_kv_heads != 0:
            raise ModelError(
                f"num_attention_heads {self.num_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2 != 0:
            raise ModelError(f"head_dim {self.head_dim} is odd, rotary embedding needs an even one")

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
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


def token_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """One id, a list of ids or nothing, as configs write them, to a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _first_id(value: int | Sequence[int] | None) -> int | None:
    return next(iter(token_ids(value)), None)


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ModelError(f"config has no {key}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config has {key} {value!r}, it must be a positive integer")
    return value


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    """Qwen configs carry a window next to `use_sliding_window: false`; the others mean it."""
    if config.get("use_sliding_window") is False or config.get("sliding_window") is None:
        return None
    return _positive(config, "sliding_window")


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"hidden_act {activation!r} is not supported, it must be silu")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown")
        raise ModelError(f"checkpoint is quantised ({method}), use float weights or a .gguf file")
