"""A base and two adapters that bring tokens, template and ends of their own, for servers of every API."""

from pathlib import Path

from tests.e2e.beside_layouts import LAYOUTS, make_base, make_weights


def make_paths(directory: Path) -> dict[str, Path]:
    """The base, an adapter that adds tool calls and one that ends with <|im_end|>."""
    model = make_base(directory / "base")
    paths = {"base": directory / "base", "tools": directory / "tools", "chatml": directory / "chatml"}
    for seed, (name, layout) in enumerate((("tools", "llama_factory_pad"), ("chatml", "axolotl_chatml"))):
        make_weights(model, paths[name], seed)
        LAYOUTS[layout](paths[name])
    return paths
