"""How much JSON is parsed at once: more would hold up everybody's streams, as much as this some 30 ms."""

from __future__ import annotations

MAX_CONTAINERS = 8192  # objects and lists, such as messages
MAX_VALUES = 2**18  # such as token ids; as many more as the model's context takes
MAX_DEPTH = 1024  # orjson's
UNCOUNTED_NBYTES = 16 * 2**10
