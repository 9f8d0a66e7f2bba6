"""Bodies of the administration routes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(min_length=1, max_length=256)]
Source = Annotated[str, Field(min_length=1, max_length=4096)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LoadBody(_Body):
    """An adapter to load."""

    name: Name
    source: Source = Field(
        description="A directory, absolute or from an adapter root; a name that is none there is a Hub id. "
        "hf://owner/name is always a Hub id, ./name never."
    )
    revision: str | None = Field(None, max_length=256, description="Branch, tag or commit on the Hub.")
    token: str | None = Field(None, max_length=1024, repr=False, description="Hub token for this adapter.")
    pin: bool = Field(False, description="Keep it in the memory pool.")
    warm: bool = Field(False, description="Load it into the memory pool now.")
    manifest: dict[str, Any] | None = Field(None, description="Fields that override its loraserve.json.")


class PinBody(_Body):
    pinned: bool


class VllmLoadBody(BaseModel):
    """vLLM's body; `lora_path` is what `source` is at POST /adapters."""

    lora_name: Name
    lora_path: Source
    load_inplace: bool = Field(False, description="Replace the adapter of this name.")


class VllmUnloadBody(BaseModel):
    lora_name: Name
    lora_int_id: int | None = None


class ReceiptBody(BaseModel):
    """What loading an adapter found and applied."""

    tensors: int
    modules: list[str]
    layers: list[int]
    rank: int
    ranks: list[int]
    nbytes: int
    hash: str
    base_check: str
    base_model: str | None


class AdapterBody(BaseModel):
    """One adapter; `path` is shown to administrators only, counts are since it was registered."""

    name: str
    path: str | None
    state: str = Field(description="registered, loading, resident or failed.")
    rank: int
    nbytes: int
    pinned: bool
    num_running: int
    num_waiting: int
    requests: int
    tokens: int
    loads: int
    evictions: int
    last_load_s: float | None
    description: str | None
    receipt: ReceiptBody


class AdaptersBody(BaseModel):
    adapters: list[AdapterBody]


class WarmBody(BaseModel):
    seconds: float
