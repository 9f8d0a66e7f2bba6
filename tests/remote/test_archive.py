"""Archives: the wanted files and nothing else, within bounds, wherever names lead."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from loraserve.errors import AdapterFormatError
from loraserve.remote.archive import unpack

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w" * 1000}
LIMIT = 10_000


def wants(name: str) -> bool:
    return name in FILES


def make(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in files.items():
                file.writestr(name, data)
        return path
    with tarfile.open(path, f"w:{'gz' if path.suffix == '.tgz' else ''}") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def unpacked(archive: Path) -> dict[str, bytes]:
    into = archive.parent / "into"
    into.mkdir()
    unpack(archive, archive.name, into, wants, LIMIT)
    assert {path.name for path in archive.parent.iterdir()} == {archive.name, "into"}
    return {path.name: path.read_bytes() for path in into.rglob("*")}


@pytest.mark.parametrize("name", ["a.tar", "a.tgz", "a.zip"])
@pytest.mark.parametrize("folder", ["", "sql/", "./"])
def test_an_adapter_is_unpacked(tmp_path: Path, name: str, folder: str) -> None:
    others = {f"{folder}README.md": b"x", f"{folder}checkpoint-1/optimizer.pt": b"y"}
    files = {f"{folder}{file}": data for file, data in FILES.items()}
    assert unpacked(make(tmp_path / name, {**others, **files})) == FILES


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
@pytest.mark.parametrize(
    "outside",
    [
        "../adapter_config.json",
        "/adapter_config.json",
        "x/../../adapter_config.json",
        "a/b/c/adapter_config.json",
    ],
)
def test_nothing_leaves_the_directory(tmp_path: Path, name: str, outside: str) -> None:
    archive = make(tmp_path / name, {outside: b"evil"})
    try:
        found = unpacked(archive)
    except AdapterFormatError:
        found = {}
    assert set(found) <= {"adapter_config.json"}
    assert not (tmp_path.parent / "adapter_config.json").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
def test_what_is_no_file_is_none(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("adapter_config.json")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(AdapterFormatError, match="no adapter"):
        unpacked(tmp_path / "a.tar")


def test_of_a_member_that_comes_twice_the_last_counts(tmp_path: Path) -> None:
    archive = make(tmp_path / "a.tar", {**FILES, "adapter_config.json": b"old"})
    with tarfile.open(archive, "a") as tar:
        member = tarfile.TarInfo("adapter_config.json")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"{}"))
    assert unpacked(archive) == FILES


@pytest.mark.parametrize("name", ["a.tgz", "a.zip"])
def test_a_bomb_is_refused_at_the_limit(tmp_path: Path, name: str) -> None:
    archive = make(tmp_path / name, {**FILES, "adapter_model.safetensors": bytes(50_000_000)})
    assert archive.stat().st_size < 100_000
    with pytest.raises(AdapterFormatError, match="more than 10000 bytes"):
        unpacked(archive)
    assert sum(path.stat().st_size for path in (tmp_path / "into").iterdir()) <= LIMIT


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_many_members_are_refused(tmp_path: Path, name: str) -> None:
    archive = make(tmp_path / name, {f"x{index}": b"" for index in range(5000)} | FILES)
    with pytest.raises(AdapterFormatError, match="members"):
        unpacked(archive)


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_two_adapters_are_not_one(tmp_path: Path, name: str) -> None:
    files = {f"{folder}/{file}": data for folder in ("a", "b") for file, data in FILES.items()}
    with pytest.raises(AdapterFormatError, match="several directories"):
        unpacked(make(tmp_path / name, files))


@pytest.mark.parametrize("name", ["a.tar", "a.tgz", "a.zip"])
@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_damaged_ones_are_refused(tmp_path: Path, name: str, damage: str) -> None:
    archive = make(tmp_path / name, FILES)
    data = archive.read_bytes()
    archive.write_bytes(
        {"cut": data[: len(data) // 6], "noise": bytes(range(256)) * 10, "empty": b""}[damage]
    )
    with pytest.raises(AdapterFormatError):
        unpacked(archive)
