"""Arrows between Rust modules point one way: each takes from those below it in its crate, and no others."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

RUST = Path(__file__).parents[1] / "rust"

# Per crate, the crates it may take from, and its modules from the bottom up: those of one line don't know
# each other. A folder is one module; `cpu` and `cuda` hold modules, not code.
CRATES: dict[str, tuple[set[str], str]] = {
    "core": (
        set(),
        """
        error ids
        batch guesses ngram page_set prefix_cache request slot_table
        adapter_cache answers flows page_pool
        speculation
        memory
        sequence
        scheduler
        """,
    ),
    "sim": (
        {"core"},
        """
        error histogram step_shape
        costs loader workload
        replica router
        fleet
        """,
    ),
    "adapters": (
        set(),
        """
        base_linears base_weights error foreign layout pace
        fields host_tier pattern read slice
        shape shards
        weights
        alpha initialisation matrix names target tensor_name
        config
        bind place tables
        norms token_lora
        factor replaced_rows
        columns content notes
        head
        receipt
        pack
        adapter
        fuzz
        """,
    ),
    "bounds": (set(), "json protobuf"),
    "kernels": (
        {"adapters"},
        """
        error
        geometry sampling quantized cuda::error
        step_arrays
        cpu::memory cpu::pending cpu::sync cpu::simd
        cpu::threads
        cpu::element cpu::step
        cpu::quantized cpu::panel_product
        cpu::linear
        cpu::norm cpu::activation cpu::sampling cpu::base_linears
        cpu::rope cpu::lora cpu::attention
        cpu::gemm
        cpu::token_lora cpu::token_rows
        cpu::context
        cpu::program
        cuda::cache cuda::sources cuda::page_moves cuda::work_list
        cuda::driver cuda::launch
        cuda::memory cuda::target
        cuda::module cuda::nvrtc
        cuda::compiler cuda::model cuda::upload
        cuda::adapter_table cuda::facts cuda::modules
        cuda::staging cuda::attention_plan
        cuda::step cuda::sampling
        cuda::lora cuda::elementwise
        cuda::attention
        cuda::context
        """,
    ),
}

Module = tuple[str, ...]
BRANCHES: set[Module] = {("cpu",), ("cuda",)}


def modules_of(source: Path) -> dict[Module, str]:
    """The text of each module of a crate, without comments, strings and tests."""
    modules = {}
    for file in sorted(source.rglob("*.rs")):
        path = file.relative_to(source).with_suffix("").parts
        if path[-1] == "tests":
            continue
        module = path[:-1] if path[-1] in ("mod", "lib") else path
        text = re.sub(r"//[^\n]*", "", file.read_text())
        text = re.sub(r'"(?:[^"\\]|\\.)*"', '""', text, flags=re.DOTALL)
        modules[module] = re.split(r"#\[cfg\(test\)\]\s*mod tests", text)[0]
    return modules


def expand(tree: str) -> Iterator[str]:
    """The paths of a use tree: `a::{b, c::{d, e}}` is a::b, a::c::d and a::c::e."""
    head, brace, rest = tree.partition("{")
    if not brace:
        yield re.sub(r"\s+as\s+\w+", "", tree).strip()
        return
    depth, start = 0, 0
    body = rest[: rest.rindex("}")]
    for i, char in enumerate(body + ","):
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            if body[start:i].strip():
                yield from (head.strip() + path for path in expand(body[start:i]))
            start = i + 1


def absolute(path: str, module: Module) -> Module | None:
    """A path as seen in `module`, from the root of the crate; None if it leads to another crate."""
    parts = path.split("::")
    if parts[0] not in ("crate", "self", "super"):
        return None
    base: Module = () if parts[0] == "crate" else module
    for i, part in enumerate(parts):
        if part == "super":
            base = base[:-1]
        elif part not in ("crate", "self"):
            return (*base, *parts[i:])
    return base


def paths_in(text: str) -> Iterator[str]:
    """Every path that a module takes something by, whether imported or written out."""
    for tree in re.findall(r"\buse\s+([^;]+);", text):
        yield from expand(tree)
    yield from re.findall(r"\b(?:crate|super)(?:::\w+)+", re.sub(r"\buse\s+[^;]+;", "", text))


def unit_of(path: Module, modules: dict[Module, str]) -> Module:
    """The listed module that a path lies in: the first name, or the second within a branch."""
    depth = 2 if path[:1] in BRANCHES else 1
    unit = path[:depth]
    return unit if any(module[: len(unit)] == unit for module in modules) else unit[:-1]


def arrows(source: Path) -> set[tuple[str, str]]:
    """(module, module it takes from) of the crate at `source`."""
    modules = modules_of(source)
    reexports: dict[Module, Module] = {}
    for module, text in modules.items():
        for tree in re.findall(r"\bpub(?:\([^)]*\))?\s+use\s+([^;]+);", text):
            for path in expand(tree):
                inside = path if path.split("::")[0] in ("crate", "self", "super") else f"self::{path}"
                target = absolute(inside, module)
                if target and unit_of(target, modules):
                    reexports[(*module, target[-1])] = target
    found = set()
    for module, text in modules.items():
        own = unit_of(module, modules)
        if not own or own in BRANCHES:
            continue
        for path in paths_in(text):
            target = absolute(path, module)
            while target in reexports:
                target = reexports[target]
            if target and (unit := unit_of(target, modules)) and unit not in (own, *BRANCHES):
                found.add(("::".join(own), "::".join(unit)))
    return found


def violations(source: Path, layers: str) -> list[str]:
    """What is wrong with a crate whose modules should lie as `layers` says."""
    place = {name: i for i, line in enumerate(layers.split("\n")) for name in line.split()}
    units = {"::".join(unit_of(module, modules)) for modules in [modules_of(source)] for module in modules}
    units -= {"", *("::".join(branch) for branch in BRANCHES)}
    wrong = [f"{name} has no layer" for name in sorted(units - place.keys())]
    wrong += [f"{name} is listed and isn't there" for name in sorted(place.keys() - units)]
    for taker, giver in sorted(arrows(source)):
        if place.get(taker, 0) <= place.get(giver, 0):
            wrong.append(f"{taker} takes from {giver}, which doesn't lie below it")
    return wrong


@pytest.mark.parametrize("crate", CRATES)
def test_modules_take_from_those_below_only(crate: str) -> None:
    assert violations(RUST / crate / "src", CRATES[crate][1]) == []


@pytest.mark.parametrize("crate", CRATES)
def test_crates_know_only_those_below(crate: str) -> None:
    allowed = CRATES[crate][0]
    dependencies = (RUST / crate / "Cargo.toml").read_text().split("[dev-dependencies]")[0]
    assert set(re.findall(r"^loraserve-(\w+)", dependencies, flags=re.MULTILINE)) <= allowed
    for text in modules_of(RUST / crate / "src").values():
        assert set(re.findall(r"\bloraserve_(\w+)::", text)) <= allowed


def test_a_circle_is_found_however_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "cpu" / "gemm").mkdir(parents=True)
    (tmp_path / "lib.rs").write_text("mod error;\npub use error::Refusal;\n")
    (tmp_path / "error.rs").write_text("pub struct Refusal;\n")
    (tmp_path / "cpu" / "mod.rs").write_text("mod gemm;\nmod lora;\n")
    (tmp_path / "cpu" / "lora.rs").write_text(
        "use crate::Refusal; // not super::gemm::Tile\npub struct Lora;\n"
    )
    (tmp_path / "cpu" / "gemm" / "mod.rs").write_text("mod tiles;\nuse super::{lora::Lora, super::error};\n")
    (tmp_path / "cpu" / "gemm" / "tiles.rs").write_text(
        "use super::Tile;\nfn f(_: crate::cpu::lora::Lora) {}\n"
    )
    layers = "error\ncpu::lora\ncpu::gemm"
    assert violations(tmp_path, layers) == []
    for circle in (
        "use super::gemm::Tile;",
        "use super::{gemm::{Tile, Other as Another}};",
        "fn f(_: super::gemm::Tile) {}",
        "use crate::cpu::{\n    gemm,\n};",
        "pub(super) use super::gemm::Tile;",
    ):
        (tmp_path / "cpu" / "lora.rs").write_text(circle)
        assert violations(tmp_path, layers) == ["cpu::lora takes from cpu::gemm, which doesn't lie below it"]
    (tmp_path / "error.rs").write_text("#[cfg(test)]\nmod tests {\n    use crate::cpu::lora::Lora;\n}\n")
    (tmp_path / "cpu" / "lora.rs").write_text("")
    assert violations(tmp_path, layers) == []
    assert violations(tmp_path, "error\ncpu::gemm") == ["cpu::lora has no layer"]
