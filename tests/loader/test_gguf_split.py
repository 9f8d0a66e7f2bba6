"""Models split over several .gguf files: read as one, refused by name where they don't belong together."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from loraserve.errors import ModelError
from loraserve.loader import open_checkpoint

from tests.loader.test_gguf_file import write_gguf

NAMES = [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
NORMS = ("output_norm.weight", "blk.0.attn_norm.weight")


def write_part(path: Path, number: int, count: int = 3, total: int = 3, name: str = "") -> None:
    """One of three files, as gguf-split writes them: metadata in the first, a tensor in each."""

    def place(writer: gguf.GGUFWriter) -> None:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", total)

    if number == 0:
        write_gguf(path, edit=place)
        return
    writer = gguf.GGUFWriter(path, "llama")
    place(writer)
    writer.add_tensor(name or NORMS[number - 1], np.full(32, number, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in NAMES]
    for number, path in enumerate(paths):
        write_part(path, number)
    return paths


def test_all_parts_are_one_model(parts: list[Path]) -> None:
    with open_checkpoint(parts[0]) as checkpoint:
        assert checkpoint.files() == parts
        assert checkpoint.tensor("model.embed_tokens.weight")[1, 0] == 32
        assert torch.equal(checkpoint.tensor("model.norm.weight"), torch.full((32,), 1.0))
        assert torch.equal(checkpoint.tensor("model.layers.0.input_layernorm.weight"), torch.full((32,), 2.0))


def _swap(parts: list[Path]) -> None:
    content = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    parts[2].write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "opened", "message"),
    [
        (lambda parts: None, NAMES[1], r"is part 2 of 3: give the first, .*m-00001-of-00003\.gguf"),
        (lambda parts: parts[2].unlink(), NAMES[0], r"part 1 of 3: m-00003-of-00003\.gguf is missing"),
        (
            lambda parts: [part.unlink() for part in parts[1:]],
            NAMES[0],
            r"m-00002-of-00003\.gguf and 1 more are missing",
        ),
        (
            lambda parts: parts[0].rename(parts[0].with_name("m.gguf")),
            "m.gguf",
            r"its name must end in -00001-of-00003\.gguf",
        ),
        (_swap, NAMES[0], r"m-00002-of-00003\.gguf says that it is part 3 of 3, expected 2 of 3"),
        (lambda parts: write_part(parts[0], 0, total=4), NAMES[0], "all parts have 3 tensors, expected 4"),
        (lambda parts: write_part(parts[0], 0, count=65535), NAMES[0], "-00001-of-65535.gguf"),
        (
            lambda parts: write_part(parts[2], 2, name=NORMS[0]),
            NAMES[0],
            r"tensor output_norm.weight is in m-00002-of-00003\.gguf, too",
        ),
        (lambda parts: parts[1].write_bytes(b"GGUF"), NAMES[0], "m-00002.* is cut short at byte 4"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    damage: Callable[[list[Path]], object], opened: str, message: str, parts: list[Path]
) -> None:
    damage(parts)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(parts[0].with_name(opened))


def test_a_tensor_that_is_cut_short_names_its_part(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:-64])
    with (
        open_checkpoint(parts[0]) as checkpoint,
        pytest.raises(
            ModelError, match=r"^[^:]*m-00002-of-00003\.gguf: tensor output_norm.weight is truncated"
        ),
    ):
        checkpoint.tensor("model.norm.weight")
