"""`TemplatePool`: processes that render templates, so that none holds up or fills the engine's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

from loraserve.confined.pool import NUM_PROCESSES, ConfinedPool

CPU_LIMIT_S = 5.0  # of one text; templates of models take milliseconds


class TemplatePool:
    """Renders from any thread; what fails or runs over takes its process with it, and the next is started.

    Args:
        num_processes: texts that can be rendered at once.
        cpu_limit_s: seconds of a core that one text may take.
    """

    def __init__(self, num_processes: int = NUM_PROCESSES, cpu_limit_s: float = CPU_LIMIT_S) -> None:
        self._confined = ConfinedPool(
            "loraserve.text.template_worker", "chat templates", cpu_limit_s, num_processes
        )

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The text of a template; raises as `ConfinedPool.ask` does.

        Args:
            source: the template.
            variables: of the types of JSON, and tuples.
        """
        return self._confined.ask("render", source, dict(variables))

    def names(self, source: str) -> frozenset[str]:
        """Names of variables that a template reads and does not set. Raises as `render` does."""
        return frozenset(self._confined.ask("names", source, {}).split())


@cache
def _pool_of(_pid: int) -> TemplatePool:
    return TemplatePool()


def shared_pool() -> TemplatePool:
    """The processes of this process; a forked child has others."""
    return _pool_of(os.getpid())
