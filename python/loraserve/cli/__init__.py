"""The `loraserve` command."""

from loraserve.cli.main import main

__all__ = ["main"]
