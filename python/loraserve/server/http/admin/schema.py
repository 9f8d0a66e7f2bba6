"""Bodies of the administration routes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field

from loraserve.server.http.request_body import Elsewhere, Neutral, NoEffect, RequestBody
from loraserve.settings.fields import WEIGHTS

Name = Annotated[str, Field(min_length=1, max_length=256)]
Generation = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0.0001, le=1)]
Source = Annotated[str, Field(min_length=1, max_length=4096)]


class LoadBody(RequestBody):
    """An adapter to load."""

    elsewhere: ClassVar[Elsewhere] = {
        "path": "source",
        "repo": "source",
        "lora_name": "name",
        "lora_path": "source",
        "adapter_id": "name",
        "pinned": "pin",
        "load_inplace": "replace",
    }

    name: Name
    source: Source = Field(
        description="A directory, absolute or from an adapter root; a name that is none there is a Hub id. "
        "hf://owner/name is always a Hub id, ./name never."
    )
    revision: str | None = Field(None, max_length=256, description="Branch, tag or commit on the Hub.")
    token: str | None = Field(None, max_length=1024, repr=False, description="Hub token for this adapter.")
    pin: bool = Field(False, description="Keep it in the memory pool.")
    warm: bool = Field(False, description="Load it into the memory pool now.")
    replace: bool = Field(False, description="Take the name from other content.")
    manifest: dict[str, Any] | None = Field(None, description="Fields that override its loraserve.json.")
    expected_generation: Generation | None = Field(
        None, description="What the name must be at, 0 for not loaded; 409 otherwise."
    )
    share: Share | None = Field(
        None, description="Of the name's requests that get it, the others get what they got; with replace."
    )
    weight: float | None = Field(
        None,
        ge=WEIGHTS[0],
        le=WEIGHTS[1],
        description="Of its share of the engine beside other adapters, where these are told apart "
        "(--fair-by); left out it stays as it was, or is 1.",
    )
    shadow: Fraction | None = Field(
        None, description="Of the name's requests that are copied to it, which answers none; with replace."
    )


class SharesBody(RequestBody):
    """Which generations of an adapter get which shares of its requests; they sum to 1."""

    shares: Annotated[dict[Annotated[int, Field(ge=1)], Share], Field(min_length=1, max_length=64)]


class ShadowBody(RequestBody):
    """Which generation of an adapter copies of its requests run on."""

    generation: Annotated[int, Field(ge=1)] = Field(description="One that is kept and answers no requests.")
    fraction: Fraction = Field(description="Of the requests that name the adapter alone and no generation.")


class RollbackBody(RequestBody):
    """Where to go back to."""

    generation: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Left out, shares end, or else it goes back by one."
    )
    expected_generation: Generation | None = Field(
        None, description="What the name must be at; 409 otherwise."
    )


class ShadowResultsBody(BaseModel):
    """What copies of requests came to beside the answers that were given, since they are compared.

    Tokens and seconds are sums over all that were compared.
    """

    fraction: float = Field(description="Of requests that are copied; 0 once it is a shadow no more.")
    compared: int
    identical: int = Field(description="Of those compared, with the same text, reasoning and calls.")
    ending_alike: int = Field(description="Of those compared, with the same finish reason.")
    agreement: float = Field(
        description="The mean of tokens before the first that differs, over those of the longer answer."
    )
    tokens: int
    shadow_tokens: int
    seconds: float = Field(description="That the answers ran.")
    shadow_seconds: float = Field(description="That their copies ran.")
    errors: int = Field(description="Copies that were refused or failed.")
    dropped: int = Field(description="Copies that there was no room or no time for.")


class GenerationBody(BaseModel):
    """One generation of an adapter; `source` is shown to administrators alone."""

    number: int
    hash: str
    source: str | None
    since: float = Field(description="When it was published, in Unix seconds.")
    current: bool
    kept: bool = Field(description="Whether requests may pin it as NAME@NUMBER.")
    share: float
    requests: int | None
    shadow: ShadowResultsBody | None = Field(description="Of one that is or was a shadow.")


class GenerationsBody(BaseModel):
    """What is remembered of an adapter's generations, oldest first."""

    generations: list[GenerationBody]


class PinBody(RequestBody):
    """Whether the adapter is to stay in the memory pool."""

    pinned: bool


class VllmLoadBody(RequestBody):
    """vLLM's body; `lora_path` is what `source` is at POST /adapters."""

    neutral: ClassVar[Neutral] = {"is_3d_lora_weight": (False,), "pinned": (False,)}
    elsewhere: ClassVar[Elsewhere] = {"name": "lora_name", "path": "lora_path", "source": "lora_path"}

    lora_name: Name
    lora_path: Source
    load_inplace: bool = Field(False, description="Replace the adapter of this name.")


class VllmUnloadBody(RequestBody):
    """vLLM's body; `lora_name` is what `name` is at DELETE /adapters/{name}."""

    no_effect: ClassVar[NoEffect] = frozenset({"lora_int_id"})
    elsewhere: ClassVar[Elsewhere] = {"name": "lora_name"}

    lora_name: Name


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
    base_copies: list[str] = Field(
        description="Modules whose weights repeat the base model's and are left out."
    )
    notes: list[str] = Field(description="What was understood beyond the plain case, in the order found.")
    not_used: list[str] = Field(
        description="What lies beside the weights, differs from the base model's and is not used."
    )


class AdapterBody(BaseModel):
    """One adapter; counts are since it was registered.

    Administrators alone see `path` and `receipt.base_model`. Where there are keys they alone see what others
    do with it too: `state`, `pinned` and all counts are null for other keys.
    """

    name: str
    generation: int = Field(description="The current one, which requests get but for shares.")
    path: str | None
    state: str | None = Field(description="registered, loading, resident or failed.")
    rank: int
    nbytes: int
    pinned: bool | None
    weight: float | None = Field(description="Of its share of the engine beside other adapters.")
    num_running: int | None
    num_waiting: int | None
    requests: int | None
    tokens: int | None
    loads: int | None
    evictions: int | None
    uninvoked: int | None = Field(description="Requests whose prompt lacked its invocation tokens.")
    last_load_s: float | None
    description: str | None
    receipt: ReceiptBody


class FailedAdapterBody(BaseModel):
    """An adapter that the server started without; source and error are shown to administrators only."""

    name: str
    source: str | None
    error: str | None


class AdaptersBody(BaseModel):
    """Adapters by name, and those that the server started without."""

    adapters: list[AdapterBody]
    failed: list[FailedAdapterBody] = []


class WarmBody(BaseModel):
    """How long the load took; 0 if the adapter was in the memory pool already."""

    seconds: float
