"""`import loraserve` is fast and needs neither torch nor a GPU driver."""

import subprocess
import sys


def test_import_does_not_load_torch() -> None:
    code = "import sys, loraserve; from loraserve import SamplingParams; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_attributes_are_an_attribute_error() -> None:
    code = "import loraserve\ntry: loraserve.nope\nexcept AttributeError: pass\nelse: raise SystemExit(1)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_engine_needs_neither_the_servers_nor_the_grammars_packages() -> None:
    absent = [
        "pydantic",
        "fastapi",
        "uvicorn",
        "orjson",
        "llguidance",
        "grpc",
        "grpc_health",
        "prometheus_client",
    ]
    hide = "".join(f"sys.modules[{name!r}] = None; " for name in absent)
    subprocess.run([sys.executable, "-c", f"import sys; {hide}from loraserve import LLM"], check=True)
