"""The files every peer gets: one base model, adapters and prompts, so that all engines do the same work.

The base is the embedded SmolLM2-135M-Instruct, dequantised and rounded to bfloat16.
"""

import json
import shutil
import sys
from pathlib import Path

import gguf_files
import torch
from loraserve.loader.default import default_model_path
from loraserve.loader.gguf_file import GgufFile
from safetensors.torch import save_file
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from workloads import Workload, write_adapters

NUM_ADAPTERS = 32
SAFETENSORS = "model.safetensors"


def prepare(directory: Path, rank: int) -> Path:
    """Write `model/`, `adapters/`, these also in `gguf/`, and `workload.json`, once; returns their folder.

    The model's GGUF files are `gguf_models.ensure`'s.
    """
    done = directory / f"rank-{rank}"
    if done.is_dir():
        return done
    partial = directory / f"rank-{rank}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    _save_model(partial / "model")
    adapters = write_adapters(partial / "adapters", NUM_ADAPTERS, rank)
    _complete_configs(adapters)
    _write_gguf(partial / "gguf", adapters)
    workload = Workload()
    (partial / "workload.json").write_text(
        json.dumps({"prompts": workload.prompts(), "new_tokens": workload.new_tokens})
    )
    partial.rename(done)
    return done


def _save_model(path: Path) -> None:
    path.mkdir(parents=True)
    source = default_model_path()
    with GgufFile(source) as gguf:
        save_file({name: gguf.tensor(name).to(torch.bfloat16) for name in gguf.names()}, path / SAFETENSORS)
        config = gguf.raw_config | {"model_type": "llama", "hidden_act": "silu", "dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(config, indent=2))
    AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(path)


def _write_gguf(path: Path, adapters: dict[str, str]) -> None:
    path.mkdir()
    for name, source in adapters.items():
        gguf_files.write_adapter(Path(source), path / f"{name}.gguf")


def _complete_configs(adapters: dict[str, str]) -> None:
    """vLLM reads fields of adapter_config.json that PEFT fills with defaults."""
    for adapter in adapters.values():
        file = Path(adapter) / "adapter_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"bias": "none", "use_rslora": False, "use_dora": False}))
