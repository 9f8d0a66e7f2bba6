"""Every public module, class, function and method of the package has a docstring."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "python/loraserve"

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> dict[str, str]:
    """Path within the package → source, generated stubs left out; `_core.pyi` is what Python sees of Rust."""
    paths = [*PACKAGE.rglob("*.py"), PACKAGE / "_core.pyi"]
    named = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(paths)}
    return {name: path.read_text() for name, path in named.items() if not name.startswith("v1/")}


def methods_of(definition: ast.ClassDef) -> list[Function]:
    return [node for node in definition.body if isinstance(node, Function)]


def decorators_of(function: Function) -> set[str]:
    """Last parts of their names: `@tokens.setter` is "setter", `@typing.overload` is "overload"."""
    return {ast.unparse(decorator).rpartition(".")[2] for decorator in function.decorator_list}


class Package:
    """The classes of some sources, and which of their methods are described by another class.

    A method is described by a base class, or by a Protocol all of whose methods its class has: backends and
    ops name no base, `Backend` and `Ops` say what theirs do.
    """

    def __init__(self, trees: Mapping[str, ast.Module]) -> None:
        nodes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        self._by_name: dict[str, list[ast.ClassDef]] = {}
        for node in nodes:
            self._by_name.setdefault(node.name, []).append(node)
        self._protocols = [node for node in nodes if "Protocol" in self._base_names(node)]

    def inherits_docstring(self, definition: ast.ClassDef, method: str) -> bool:
        own = self._signatures(definition)
        fulfilled = [protocol for protocol in self._protocols if self._signatures(protocol) <= own]
        return any(
            function.name == method and ast.get_docstring(function)
            for described in [*self._bases(definition), *fulfilled]
            for function in methods_of(described)
        )

    def _base_names(self, definition: ast.ClassDef) -> set[str]:
        """`Reader[T]` counts as `Reader`, `typing.Protocol` as `Protocol`."""
        plain = [base.value if isinstance(base, ast.Subscript) else base for base in definition.bases]
        return {ast.unparse(base).rpartition(".")[2] for base in plain}

    def _bases(self, definition: ast.ClassDef) -> list[ast.ClassDef]:
        direct = [
            base
            for name in self._base_names(definition) - {definition.name}
            for base in self._by_name.get(name, [])
        ]
        return direct + [further for base in direct for further in self._bases(base)]

    def _signatures(self, definition: ast.ClassDef) -> set[str]:
        """Names of the methods, inherited ones included, each with those of its arguments."""
        functions = [
            function
            for described in [definition, *self._bases(definition)]
            for function in methods_of(described)
        ]
        return {f"{function.name}({_argument_names(function.args)})" for function in functions}


def _argument_names(arguments: ast.arguments) -> str:
    return ", ".join(argument.arg.lstrip("_") for argument in [*arguments.args, *arguments.kwonlyargs])


def undocumented(trees: Mapping[str, ast.Module]) -> dict[str, list[str]]:
    """File → its public definitions without a docstring; what is private or inside a function is exempt."""
    package = Package(trees)

    def is_described(function: Function, owner: ast.ClassDef | None) -> bool:
        return bool(ast.get_docstring(function)) or (
            owner is not None and package.inherits_docstring(owner, function.name)
        )

    def missing(body: list[ast.stmt], within: str, owner: ast.ClassDef | None) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.If | ast.Try):  # another platform's, or an optional dependency's
                yield from missing([*node.body, *node.orelse], within, owner)
            if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
                continue
            name = within + node.name
            if isinstance(node, ast.ClassDef):
                if not ast.get_docstring(node):
                    yield name
                yield from missing(node.body, f"{name}.", node)
            elif not (is_described(node, owner) or decorators_of(node) & {"overload", "setter", "deleter"}):
                yield name

    return {
        path: ([] if ast.get_docstring(tree) else ["the module"]) + list(missing(tree.body, "", None))
        for path, tree in trees.items()
    }


MISSING = undocumented({path: ast.parse(source) for path, source in sources().items()})


@pytest.mark.parametrize("path", MISSING)
def test_every_public_definition_has_a_docstring(path: str) -> None:
    assert not MISSING[path]


def test_definitions_without_docstrings_are_found_and_those_described_elsewhere_are_not() -> None:
    described = '''
"""Shapes."""
class Shape(Protocol):
    """A closed figure."""
    def area(self, unit: str) -> float:
        """How large it is, in `unit`."""
    def name(self) -> str: ...
class Base:
    """What figures share."""
    def edges(self) -> int:
        """How many."""
'''
    bare = '''
import sys
class Square(Base):
    def area(self, unit: str) -> float: ...
    def name(self) -> str: ...
    def edges(self) -> int: ...
    def _halves(self) -> None: ...
    def __len__(self) -> int: ...
    @property
    def side(self) -> float: ...
    @side.setter
    def side(self, value: float) -> None: ...
    class Corner: ...
class Circle:
    """It has no name, so it is no Shape."""
    def area(self, unit: str) -> float: ...
class Field:
    """Its area takes no unit, so it is none either."""
    def area(self) -> float: ...
    def name(self) -> str: ...
class _Hidden:
    def method(self) -> None: ...
async def draw() -> None:
    def stroke() -> None: ...
@overload
def scale(by: int) -> None: ...
if sys.platform == "linux":
    def show() -> None: ...
'''
    assert undocumented({"described.py": ast.parse(described), "bare.py": ast.parse(bare)}) == {
        "described.py": ["Shape.name"],
        "bare.py": [
            "the module",
            "Square",
            "Square.name",
            "Square.side",
            "Square.Corner",
            "Circle.area",
            "Field.area",
            "Field.name",
            "draw",
            "show",
        ],
    }
