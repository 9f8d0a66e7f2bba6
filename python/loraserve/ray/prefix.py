"""What prompts that begin alike have in common, as far as that can be told without tokens."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraserve.request import GenerateRequest

PREFIX_CHARS = 512  # some hundred tokens: what is shorter is computed as soon as it is looked for
PREFIX_TOKENS = 128


def prefix_of(request: GenerateRequest) -> bytes:
    """The same of prompts that begin with the same text, as chats of one system prompt do; b"" of none.

    It does not leave this process, and no cached prompt is found by it.
    """
    prompt, messages = request.prompt, request.messages
    if isinstance(prompt, str):
        text = prompt[:PREFIX_CHARS]
    elif prompt is not None:
        text = repr(list(prompt[:PREFIX_TOKENS]))
    elif messages:
        text = repr(messages[0])[:PREFIX_CHARS]
        if len(messages) > 1 and len(text) < PREFIX_CHARS:
            text += repr(messages[1])[: PREFIX_CHARS - len(text)]
    else:
        return b""
    scope = f"{request.tenant}\0{request.cache_salt}\0{text}"
    return hashlib.blake2b(scope.encode(errors="surrogatepass"), digest_size=8).digest()
