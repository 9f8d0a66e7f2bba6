"""Reads YAML strictly: the safe subset, and no name given twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from loraserve.settings.errors import ConfigError

MAX_NBYTES = 2**20
MAX_VALUES = 2**16  # each alias counted as what it stands for
MAX_DEPTH = 100
MAX_INTEGER_CHARS = 100


def read_yaml(path: Path) -> Any:
    """The file's value. Raises ConfigError."""
    try:
        with path.open("rb") as file:  # a pipe is as good: shells write <(command)
            data = file.read(MAX_NBYTES + 1)
        if len(data) > MAX_NBYTES:
            raise ConfigError(f"{path} has more than {MAX_NBYTES} bytes, the limit")
        return yaml.load(data.decode("utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe subset; a name given twice is an error, where PyYAML would take the last.

    So are aliases that lead back to themselves, or to very many values.
    """

    def get_single_node(self) -> yaml.Node | None:
        """The document, within bounds."""
        node = super().get_single_node()
        if node is not None and _num_values(node, {}) > MAX_VALUES:
            raise yaml.YAMLError(f"it has more than {MAX_VALUES} values, aliases counted, which is the limit")
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """An integer of a length that can be shown."""
        if len(node.value) > MAX_INTEGER_CHARS:
            raise yaml.constructor.ConstructorError(
                None, None, f"integer of more than {MAX_INTEGER_CHARS} characters", node.start_mark
            )
        return int(super().construct_yaml_int(node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, count in counts.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def _num_values(node: yaml.Node, known: dict[int, int | None], depth: int = 0) -> int:
    """Values that a node stands for; `known` has those counted, and None for those that it is within."""
    key = id(node)
    if known.get(key, 0) is None:
        raise yaml.YAMLError("an alias stands within what it stands for")
    if depth > MAX_DEPTH:
        raise yaml.YAMLError(f"it is nested deeper than {MAX_DEPTH}, the limit")
    if key not in known:
        known[key] = None
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        known[key] = 1 + sum(_num_values(part, known, depth + 1) for part in inner)
    return known[key] or 0
