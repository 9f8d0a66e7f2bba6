"""Arrows point one way: a module of the package imports from layers below its own, or from its own."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "python/loraserve"

# From the bottom up; a module belongs to the longest name here that it is or lies in.
LAYERS = (
    "_core",
    "validation.printable",
    "errors",
    "confined",
    "validation",
    "remote",
    "sampling.grammar",
    "sampling_params",
    "tools",
    "pooling",
    "request",
    "text",
    "models",
    "loader",
    "adapters",
    "config",
    "backends",
    "sampling",
    "engine",
    "llm",
    "async_engine",
    "planning",
    "settings",
    "v1",
    "wire",
    "client",
    "server.listen",
    "server.access",
    "server.observe",
    "server.adapters",
    "server.request_run",
    "server.json_bounds",
    "server.batches",
    "server.grpc",
    "server.http",
    "server",
    "ray",
    "cli",
    "__main__",
)

MAX_LINES = 450
ROOT_MODULES = {"llm", "async_engine", "client", "config", "request", "sampling_params", "errors", "__main__"}


def modules() -> dict[str, Path]:
    """Name within the package → file, generated stubs left out; a package goes by its own name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and parts[0] != "v1":
            found[name] = path
    return found


MODULES = modules()


def layer_of(name: str) -> str:
    owners = [layer for layer in LAYERS if name == layer or name.startswith(f"{layer}.")]
    assert owners, f"{name} lies in no layer, add one to LAYERS"
    return max(owners, key=len)


def imports(path: Path) -> set[str]:
    """What a file imports of the package, also inside functions and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("loraserve."):
                inner = name.removeprefix("loraserve.")
                known = inner in MODULES or inner == "_core" or inner.startswith("v1")
                found.add(inner if known else inner.rpartition(".")[0])
    return found - {""}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_imports_only_from_below(name: str) -> None:
    own = LAYERS.index(layer_of(name))
    above = {other for other in imports(MODULES[name]) if LAYERS.index(layer_of(other)) > own}
    assert not above, f"{name} is of layer {layer_of(name)} and imports from above"


def test_no_modules_import_one_another_in_a_circle() -> None:
    left = {name: imports(path) & MODULES.keys() for name, path in MODULES.items()}
    while free := {name for name, others in left.items() if not others & left.keys() - {name}}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left, "these modules lie on circles of imports, or above one"


def test_root_holds_the_api_and_nothing_else() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_MODULES | {"__init__"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_file_is_short(name: str) -> None:
    assert len(MODULES[name].read_text().splitlines()) <= MAX_LINES
