"""The sdist has what a wheel is made of; `make package-check` makes one of it."""

from __future__ import annotations

import posixpath
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.deploy.files import ROOT


def maturin() -> str | None:
    beside = Path(sys.executable).with_name("maturin")
    return str(beside) if beside.exists() else shutil.which("maturin")


@pytest.mark.skipif(maturin() is None, reason="maturin is not installed")
def test_what_the_crates_embed_and_the_package_has_is_in_it(tmp_path: Path) -> None:
    subprocess.run(
        [str(maturin()), "sdist", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, check=True
    )
    (sdist,) = tmp_path.glob("loraserve-*.tar.gz")
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2]: member for member in archive if member.isreg()}
        sources = {
            name: archive.extractfile(member).read().decode()  # type: ignore[union-attr]
            for name, member in files.items()
            if re.match(r"rust/\w+/src/.*\.rs", name)
        }
    embedded = {
        posixpath.normpath(f"{posixpath.dirname(name)}/{path}")
        for name, text in sources.items()
        for path in re.findall(r'include_(?:str|bytes)!\("([^"]+)"\)', text)
    }
    assert embedded
    assert embedded <= files.keys()
    tracked = subprocess.run(
        ["git", "ls-files", "python"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(tracked) <= files.keys()
    assert {"Cargo.lock", "LICENSE", "README.md", "PKG-INFO", "pyproject.toml"} <= files.keys()
    assert not [name for name in files if name.startswith(("docs/", "benches/", "tests/"))]
