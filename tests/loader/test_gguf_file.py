"""The .gguf loader: weights against transformers, metadata to config, and each way a file can be wrong."""

import builtins
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from loraserve.errors import ModelError
from loraserve.loader import open_checkpoint
from loraserve.loader.gguf_header import parse_header

ARCH_KEYS = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
}
TOKENS = ["<s>", "</s>", "a", "b", "ab"]


def write_gguf(
    path: Path, arch: str = "llama", edit: Callable[[gguf.GGUFWriter], None] | None = None
) -> Path:
    """A GGUF file with metadata and two tensors: enough to open, not to run."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in ARCH_KEYS.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_eos_token_id(1)
    writer.add_tensor("token_embd.weight", np.arange(160, dtype=np.float32).reshape(5, 32))
    if edit is not None:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_weight_equals_transformers(smollm2_path: str, hf_smollm2: tuple[Any, Any]) -> None:
    expected = {
        name: tensor for name, tensor in hf_smollm2[0].state_dict().items() if name != "lm_head.weight"
    }
    with open_checkpoint(smollm2_path) as checkpoint:
        assert set(checkpoint.names()) == set(expected)
        different = [name for name in expected if not torch.equal(checkpoint.tensor(name), expected[name])]
    assert different == []


def test_the_config_equals_transformers(smollm2_path: str, hf_smollm2: tuple[Any, Any]) -> None:
    expected = hf_smollm2[0].config
    with open_checkpoint("smollm2") as checkpoint:
        config = checkpoint.config
    assert str(checkpoint.path) == smollm2_path
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_layers, config.hidden_size) == (expected.num_hidden_layers, expected.hidden_size)
    assert (config.num_heads, config.num_kv_heads) == (9, 3)
    assert (config.head_dim, config.intermediate_size) == (expected.head_dim, expected.intermediate_size)
    assert (config.vocab_size, config.max_position) == (expected.vocab_size, 8192)
    assert config.rope.theta == expected.rope_parameters["rope_theta"]
    assert config.rms_norm_eps == expected.rms_norm_eps
    assert (config.tie_word_embeddings, config.eos_token_ids, config.bos_token_id) == (True, (2,), 1)


def test_qwen_rows_stay_and_llama_rows_are_put_back(tmp_path: Path) -> None:
    rows = np.arange(32, dtype=np.float32)[:, None] * np.ones((1, 32), dtype=np.float32)

    def add_q(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_q.weight", rows)

    order = {}
    for arch in ("llama", "qwen2"):
        with open_checkpoint(write_gguf(tmp_path / f"{arch}.gguf", arch, add_q)) as checkpoint:
            order[arch] = checkpoint.tensor("model.layers.0.self_attn.q_proj.weight")[:, 0].tolist()
    assert order["qwen2"] == list(range(32))
    assert order["llama"][:16] == [*range(0, 16, 2), *range(1, 16, 2)]


def test_llama_3_frequency_factors_become_rope_scaling(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    path = write_gguf(tmp_path / "m.gguf", edit=lambda w: w.add_tensor("rope_freqs.weight", factors))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config.rope.kind == "default"
        assert checkpoint.config.rope.factors == tuple(factors.tolist())


def test_metadata_becomes_the_tokenizer(tmp_path: Path) -> None:
    with open_checkpoint(write_gguf(tmp_path / "m.gguf")) as checkpoint:
        tokenizer = checkpoint.load_tokenizer()
    assert tokenizer.encode("aab") == [2, 4]
    assert tokenizer.decode([2, 4, 1]) == "aab"
    assert (tokenizer.eos_token_ids, tokenizer.vocab_size) == ((1,), 5)


@pytest.mark.parametrize(
    ("arch", "edit", "message"),
    [
        ("gpt2", None, "architecture gpt2 is not supported, supported are llama, qwen2, qwen3"),
        ("llama", lambda w: w.add_expert_count(8), "llama.expert_count is 8, only 0 is supported"),
        (
            "llama",
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            "rope scaling 'longrope'",
        ),
        ("llama", lambda w: w.add_rope_dimension_count(8), "rope.dimension_count is 8, only head_dim 16"),
    ],
)
def test_an_unsupported_file_is_refused(
    arch: str, edit: Callable[[gguf.GGUFWriter], None] | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", arch, edit))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda w: w.add_add_eos_token(True),
            "tokenizer.ggml.add_eos_token is true",
        ),
        (lambda w: w.add_tokenizer_pre("klingon"), "tokenizer.ggml.pre 'klingon' is not supported"),
        (lambda w: w.kv_data[0].pop("tokenizer.ggml.merges"), "metadata has no tokenizer.ggml.merges"),
    ],
)
def test_an_unsupported_tokenizer_is_refused(
    edit: Callable[[gguf.GGUFWriter], None], message: str, tmp_path: Path
) -> None:
    with (
        open_checkpoint(write_gguf(tmp_path / "m.gguf", edit=edit)) as checkpoint,
        pytest.raises(ModelError, match=message),
    ):
        checkpoint.load_tokenizer()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "m.gguf is empty"),
        (b"GGUF", "file is cut short at byte 4"),
        (b"not a gguf file at all", 'is text that begins with "not a gguf file at all"'),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1 is not supported"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 60), "file is cut short"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + b"\1\0\0\0\0\0\0\0k\x63\0\0\0", "value of type 99"),
    ],
)
def test_a_file_that_is_not_gguf_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(path)


def test_a_header_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    header_nbytes = min(tensor.offset for tensor in parse_header(whole).tensors.values())
    unpadded = len(whole[:header_nbytes].rstrip(b"\0"))
    for nbytes in range(unpadded):
        with pytest.raises(ValueError, match="cut short|not a GGUF"):
            parse_header(whole[:nbytes])


def test_a_truncated_tensor_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-64])
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(ModelError, match=r"m\.gguf: tensor token_embd.weight is truncated"),
    ):
        checkpoint.tensor("model.embed_tokens.weight")


def test_without_the_gguf_package_the_error_says_what_to_install(
    smollm2_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without_gguf(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(ModelError, match=r"pip install 'loraserve\[demo\]'"):
        open_checkpoint(smollm2_path)
