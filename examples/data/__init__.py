"""Training data of the example adapters: one file per adapter, all of it synthesised from a seed."""

from .extraction import JSON
from .pirate import PIRATE
from .sql import SQL
from .task import Example, HeldOut, Task
from .tools import TOOLS

TASKS: dict[str, Task] = {task.name: task for task in (SQL, JSON, PIRATE, TOOLS)}

__all__ = ["TASKS", "Example", "HeldOut", "Task"]
