"""`check_cost`: whether a grammar can be compiled, found out in a process that can be stopped.

llguidance bounds what a compilation takes but for the intersection of patterns, which grows exponentially:
where thirteen are on one value of a JSON schema, however they come there, it takes seconds, and twenty take
the machine's memory. What it takes does not depend on the vocabulary, so the trial's is bytes.
"""

from __future__ import annotations

import os
from functools import cache

from loraserve.confined.pool import ConfinedError, ConfinedPool, LimitError

CPU_LIMIT_S = 1.0  # large schemas take some hundredths


def check_cost(source: str) -> None:
    """Compile a grammar in llguidance's notation within limits, and forget it. One that is wrong passes.

    Raises:
        LimitError: it takes more than a second of a core or 512 MiB.
        OverloadedError, CapacityError: as `ConfinedPool.ask` does.
    """
    try:
        _pool_of(os.getpid()).ask(source)
    except LimitError:
        raise
    except ConfinedError:
        return  # the compilation itself says what is wrong


@cache
def _pool_of(_pid: int) -> ConfinedPool:
    return ConfinedPool("loraserve.sampling.grammar_trial_worker", "compilations of grammars", CPU_LIMIT_S)
