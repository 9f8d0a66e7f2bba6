"""`ServedBase`: the base model that is served, as adapters say which one they were trained on."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraserve.adapters.manifest import AdapterManifest
from loraserve.errors import AdapterFormatError
from loraserve.loader.fingerprint import VERSION
from loraserve.validation.files import expanded

_SAYS_NOTHING: Final = ("", "none", "null", "unknown")
_CACHED: Final = re.compile(r"(?:^|[/\\])models--(?P<id>[^/\\]+)[/\\]snapshots[/\\]")
_HUB_URL: Final = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/")
_QUANTISED: Final = re.compile(r"[.\-_](?:i?q\d\w*|tq\d\w*|b?f16|f32|fp16|fp32|mxfp4)$")


@dataclass(frozen=True)
class BaseComparison:
    """What an adapter says of its base, compared: `verdict` in words, `warning` where it names another."""

    verdict: str
    warning: str | None = None


@dataclass(frozen=True)
class ServedBase:
    """The base by content and by names.

    Args:
        path: its directory or file.
        fingerprint: of its weights.
        names: what it is served as; the first is what people are told.
    """

    path: Path
    fingerprint: str
    names: tuple[str, ...]

    def compare(self, adapter: str, manifest: AdapterManifest, recorded: str | None) -> BaseComparison:
        """An adapter's stamp, or else the name that its config records.

        Raises:
            AdapterFormatError: it is stamped for another base.
        """
        stamp = manifest.base_fingerprint
        if stamp is not None:
            self._check_stamp(adapter, stamp, recorded)
            return BaseComparison("the one it is stamped for")
        is_named = self.is_named(recorded)
        if is_named is None:
            return BaseComparison("not compared: its config names none, and it has no stamp")
        if is_named:
            return BaseComparison("the one its config names")
        warning = (
            f"base: its config names {recorded!r:.200}, served is {self.names[0]!r:.200}; if these are the "
            "same weights, `loraserve adapters stamp` says so"
        )
        return BaseComparison(f"ANOTHER by name: its config names {recorded!r:.200}", warning)

    def is_named(self, recorded: str | None) -> bool | None:
        """Whether a `base_model_name_or_path` means this base; None where it says nothing."""
        text = (recorded or "").strip()
        if text.lower() in _SAYS_NOTHING:
            return None
        try:
            path = expanded(text)
            if os.path.exists(path):
                if os.path.samefile(path, self.path):
                    return True
                if path.is_absolute():
                    return False
        except (OSError, ValueError, RuntimeError):
            pass  # no path of this machine: then it is a name
        return any(_same_name(text, name) for name in (*self.names, str(self.path)))

    def _check_stamp(self, adapter: str, stamp: str, recorded: str | None) -> None:
        if stamp == self.fingerprint:
            return
        if not stamp.startswith(f"{VERSION}:"):
            raise AdapterFormatError(
                f"{adapter}: base_fingerprint {stamp} is of another version of loraserve, this one takes "
                f"{VERSION}: stamp it anew with `loraserve adapters stamp --replace`"
            )
        trained_on = "" if recorded is None else f" ({recorded!r:.200} by its config)"
        raise AdapterFormatError(
            f"{adapter} is stamped for base {stamp}{trained_on}, served is {self.fingerprint} "
            f"({self.names[0]!r:.200}): serve its own base, or, where that is the one, stamp it anew with "
            "`loraserve adapters stamp --replace`"
        )


def _same_name(one: str, other: str) -> bool:
    """Hub ids as a whole, a path by its last part; in any case, however the file is quantised."""
    (owner, name), (other_owner, other_name) = _key(one), _key(other)
    return name == other_name and (owner == other_owner or owner is None or other_owner is None)


def _key(text: str) -> tuple[str | None, str]:
    """(owner, name); no owner where it is a path."""
    cached = _CACHED.search(text)
    if cached is not None:
        text = cached["id"].replace("--", "/", 1)
    text = _HUB_URL.sub("", text).lower().rstrip("/\\")
    parts = re.split(r"[/\\]", text)
    is_hub_id = len(parts) == 2 and "\\" not in text and parts[0] not in ("", ".", "..", "~")
    name = parts[-1]
    if name.endswith(".gguf"):
        name, is_hub_id = _QUANTISED.sub("", name.removesuffix(".gguf")), False
    return (parts[0] if is_hub_id else None), name
