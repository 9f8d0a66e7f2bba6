"""The peers and their virtual environments: made on first use, made anew when their pins change."""

import os
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
DEFAULT_VENVS = Path("~/.cache/loraserve-bench/peers")


@dataclass(frozen=True)
class Peer:
    """`unwanted` is uninstalled again: pinned by the engine, not needed here, and not always loadable.

    `is_dense_only`: the driver doesn't do quantised weights.
    """

    name: str
    install_env: dict[str, str] = field(default_factory=dict)
    unwanted: tuple[str, ...] = ()
    is_dense_only: bool = False
    reads_gguf: bool = False

    @property
    def requirements(self) -> Path:
        return HERE / "requirements" / f"{self.name}.txt"

    @property
    def driver(self) -> Path:
        return HERE / f"{self.name}_driver.py"


LLAMA_CPP_OPTIONS = {
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
LLAMA_CPP_BUILD = {
    "CMAKE_ARGS": " ".join(f"-D{option}={value}" for option, value in LLAMA_CPP_OPTIONS.items()),
    "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count()),
}

PEERS = {
    peer.name: peer
    for peer in (
        Peer("openvino", unwanted=("torchvision",)),
        Peer("llamacpp", LLAMA_CPP_BUILD, reads_gguf=True),
        Peer("vllm", unwanted=("torchvision", "torchaudio", "torchcodec"), is_dense_only=True),
        Peer("mistralrs", reads_gguf=True),
    )
}


def ensure_environment(peer: Peer, venvs: Path) -> Path:
    """The Python of the peer's environment. Raises RuntimeError if pip fails."""
    folder = venvs / peer.name
    python = folder / "bin/python"
    pins, installed = peer.requirements.read_text(), folder / "installed.txt"
    if installed.is_file() and installed.read_text() == pins:
        return python
    log = venvs / f"{peer.name}-install.log"
    print(f"installing {peer.name} into {folder} (minutes; log {log})", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    with log.open("w") as output:
        _pip(python, ["install", "-r", str(peer.requirements)], peer, output.fileno())
        if peer.unwanted:
            _pip(python, ["uninstall", "--yes", *peer.unwanted], peer, output.fileno())
    installed.write_text(pins)
    return python


def _pip(python: Path, arguments: list[str], peer: Peer, output: int) -> None:
    command = [str(python), "-m", "pip", *arguments]
    done = subprocess.run(
        command, env=os.environ | peer.install_env, stdout=output, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{peer.name} can't be installed: pip {arguments[0]} failed, see its log")
