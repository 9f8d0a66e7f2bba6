"""Headers of GGUF files that lie: each is one typed error that names the key or the tensor."""

import struct
from pathlib import Path
from typing import Any

import pytest
from loraserve.errors import ModelError
from loraserve.loader import open_checkpoint
from loraserve.loader.gguf_file import hf_name
from loraserve.loader.gguf_header import MAX_ELEMENTS, MAX_ROWS

from tests.fuzz import gguf_bytes

Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
UNTYPED_ARRAY = 9


def write(path: Path, **changes: Any) -> Path:
    file = path / "m.gguf"
    head = gguf_bytes.header(gguf_bytes.describe() | changes)
    file.write_bytes(gguf_bytes.padded(head) + gguf_bytes.data())
    return file


def with_metadata(**changes: Any) -> dict[str, Any]:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return {"metadata": gguf_bytes.METADATA | named}


def with_tensor(of: str, **changes: Any) -> dict[str, Any]:
    """The table with one row changed: its name, dims, type or offset."""
    rows = [list(row) for row in gguf_bytes.describe()["tensors"]]
    row = next(row for row in rows if row[0] == gguf_bytes.gguf_name(of))
    for index, field in enumerate(("name", "dims", "type", "offset")):
        row[index] = changes.get(field, row[index])
    return {"tensors": rows}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (with_metadata(general__alignment=0), "general.alignment 0, it must be a power of two"),
        (with_metadata(general__alignment=48), "general.alignment 48, it must be a power of two"),
        (with_metadata(general__alignment="32"), "general.alignment '32', it must be of type int"),
        (with_metadata(general__architecture=["llama"]), r"general.architecture \['llama'\], .* type str"),
        (with_metadata(general__note=[[1], [2]]), f"array of values of type {UNTYPED_ARRAY}"),
        (with_metadata(tokenizer__ggml__tokens=7), "tokenizer.ggml.tokens 7, it must be of type list"),
        (with_metadata(tokenizer__ggml__tokens=[1, 2]), r"tokenizer.ggml.tokens \[1, 2\], .* type list"),
        (with_metadata(tokenizer__ggml__token_type=3), "tokenizer.ggml.token_type 3, .* type list"),
        (with_metadata(tokenizer__ggml__pre=["gpt-2"]), r"tokenizer.ggml.pre \['gpt-2'\], .* type str"),
        (with_metadata(tokenizer__ggml__eos_token_id=[2]), r"eos_token_id \[2\], it must be of type int"),
        (with_metadata(tokenizer__ggml__bos_token_id=1.5), "bos_token_id 1.5, it must be of type int"),
        (with_metadata(tokenizer__chat_template=5), "tokenizer.chat_template 5, it must be of type str"),
        (
            with_metadata(llama__attention__head_count=[2, 2]),
            r"num_attention_heads \[2, 2\], it must be",
        ),
        (with_tensor(Q, dims=[1, 1, 1, 1, 32]), "'blk.0.attn_q.weight' has 5 dimensions, the limit is 4"),
        (with_tensor(Q, dims=[32, 64]), "tensors blk.0.attn_q.weight and .* overlap"),
        (with_tensor(Q, offset=7), "'blk.0.attn_q.weight' has offset 7, no multiple of 32"),
        (with_tensor(Q, offset=0), "tensors .* overlap"),
        (with_tensor(Q, name="blk.0.attn_k.weight"), "two tensors have the same name"),
        (with_tensor(Q, name=NORM), "two tensors have names that stand for the same"),
        (
            with_tensor(NORM, name="rope_freqs.weight") | with_metadata(llama__rope__scaling__factor=1.0),
            "rope has 32 frequency factors",
        ),
    ],
)
def test_a_header_that_lies_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        open_checkpoint(write(tmp_path, **changes))


@pytest.mark.parametrize("token_id", [-1, 261, 2**40])
def test_the_id_of_a_token_that_is_not_there_is_refused(token_id: int, tmp_path: Path) -> None:
    file = write(tmp_path, **with_metadata(tokenizer__ggml__bos_token_id=token_id))
    with (
        open_checkpoint(file) as checkpoint,
        pytest.raises(ModelError, match=f"bos_token_id is {token_id}, the vocabulary has 261 tokens"),
    ):
        checkpoint.load_tokenizer()


@pytest.mark.parametrize(
    ("name", "dims", "message"),
    [
        (Q, [32, 31], r"q_proj.weight has shape \[31, 32\], its rows are not those of 2 heads"),
        (Q, [], r"q_proj.weight has shape \[\], its rows are not those of 2 heads"),
        (EMBEDDING, [0, 2**63 - 1], "token_embd.weight can't be dequantised"),
        (EMBEDDING, [2**64 - 1, 2**64 - 1], "token_embd.weight is truncated"),
    ],
)
def test_a_shape_that_is_none_is_refused(name: str, dims: list[int], message: str, tmp_path: Path) -> None:
    with (
        open_checkpoint(write(tmp_path, **with_tensor(name, dims=dims))) as checkpoint,
        pytest.raises(ModelError, match=message),
    ):
        checkpoint.tensor(name)


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    value = struct.pack("<Q", 1) + b"k" + struct.pack("<IB", 7, 1)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + value * 2)
    with pytest.raises(ModelError, match="metadata has 'k' twice"):
        open_checkpoint(file)


def test_counts_beyond_what_any_model_has_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, MAX_ROWS + 1, 0))
    with pytest.raises(ModelError, match=f"{MAX_ROWS + 1} tensors, the limit of either is {MAX_ROWS}"):
        open_checkpoint(file)
    array = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, MAX_ELEMENTS + 1)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
    with pytest.raises(ModelError, match=f"array of {MAX_ELEMENTS + 1} elements, the limit is"):
        open_checkpoint(file)


@pytest.mark.parametrize("name", ["blk", "blk.", "blk.0", "blk.0.weight", "", ".", "blk.x.y"])
def test_a_name_of_another_form_stays_one(name: str) -> None:
    assert hf_name(name).endswith(name.rpartition(".")[2])


@pytest.mark.parametrize(
    ("ggml_type", "message"),
    [(31, "is of type 31, which gguf does not know: get the"), (24, "is of type I8, which gguf can't deq")],
)
def test_a_type_that_is_not_read_is_named_with_a_remedy(ggml_type: int, message: str, tmp_path: Path) -> None:
    with (
        open_checkpoint(write(tmp_path, **with_tensor(Q, type=ggml_type))) as checkpoint,
        pytest.raises(ModelError, match=message),
    ):
        checkpoint.tensor(Q)
