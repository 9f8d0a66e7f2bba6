"""Which adapter a body names: `model` and the fields other servers have for it, which have to agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, model_validator

from loraserve.adapters.registry import registered_name
from loraserve.errors import AdapterNotFoundError, InvalidRequestError
from loraserve.request import AdapterSpec
from loraserve.server.access.keys import Caller
from loraserve.server.http.foreign_fields import SELECTORS_ELSEWHERE
from loraserve.server.http.model_names import adapter_in_model
from loraserve.server.http.request_body import Elsewhere, Neutral, NoEffect, RequestBody
from loraserve.server.http.state import HttpState

LORAX_BASE_MODEL = "__base_model__"

Name: TypeAlias = Annotated[str, Field(max_length=1024)]
Weights: TypeAlias = dict[str, float]


class MergedAdapters(RequestBody):
    """A weighted sum of adapters: of their whole deltas, so that it has no cross terms."""

    ids: list[str] = Field(min_length=1)
    weights: list[float] = Field(min_length=1)
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] | None = None
    density: float | None = None
    majority_sign_method: Literal["total", "frequency"] | None = None


class LoraScale(RequestBody):
    """llama.cpp's; a number is the place of an adapter among those given at start, from 0."""

    id: int | Name
    scale: float = 1.0


class LoraRequest(RequestBody):
    """vLLM's and TensorRT-LLM's; the name decides."""

    no_effect: ClassVar[NoEffect] = frozenset({"lora_int_id", "base_model_name", "long_lora_max_len"})
    neutral: ClassVar[Neutral] = {
        "lora_path": (),
        "lora_local_path": (),
        "tensorizer_config_dict": (),
        "load_inplace": (False,),
        "is_3d_lora_weight": (False,),
    }

    lora_name: Name

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"lora_name": value} if isinstance(value, str) else value


class AdapterSelectors(RequestBody):
    """Any of these names the adapter; several have to name the same."""

    elsewhere: ClassVar[Elsewhere] = SELECTORS_ELSEWHERE

    adapters: Weights | None = Field(
        default=None, description="Adapters and weights: their exact weighted sum."
    )
    adapter: Name | Weights | None = Field(
        default=None, description="As in Python: a name, or as `adapters`."
    )
    adapter_id: Name | None = Field(default=None, description="TGI's and LoRAX'.")
    adapter_source: Literal["hub", "local", "s3", "pbase"] | None = None
    api_token: str | None = Field(
        default=None, description="Taken and not used: adapters are loaded already."
    )
    merged_adapters: MergedAdapters | None = None
    lora_path: Name | Annotated[list[Name | None], Field(min_length=1)] | None = Field(
        default=None, description="SGLang's: the name of an adapter, or one for each prompt."
    )
    lora_name: Name | None = None
    lora_request: LoraRequest | None = Field(default=None, description="vLLM's; or a name alone.")
    lora: Name | list[LoraScale] | None = Field(default=None, description="A name, or llama.cpp's list.")


def adapter_of(
    state: HttpState, caller: Caller, model: str | None, *bodies: AdapterSelectors, num_prompts: int = 1
) -> AdapterSpec:
    """The one adapter that `model` and all selectors mean; whether it exists, the engine says.

    Raises:
        InvalidRequestError: they name different ones, or ask for what a request can't do.
        AdapterNotFoundError: a number is no adapter's, or not one this caller may use.
    """
    named = adapter_in_model(state, model)
    chosen = [] if named is None else [("model", {named: 1.0})]
    for body in bodies:
        chosen += _selections(state, caller, body, num_prompts)
    if not chosen:
        return None
    first, spec = chosen[0]
    for name, other in chosen[1:]:
        if other != spec:
            raise InvalidRequestError(
                f"{first} and {name} name different adapters, {_text(spec)} and {_text(other)}: "
                "set one of them"
            )
    only = next(iter(spec), None)
    return only if only is None or spec == {only: 1.0} else spec


def _selections(
    state: HttpState, caller: Caller, body: AdapterSelectors, num_prompts: int
) -> Iterator[tuple[str, Weights]]:
    """(field, names and weights) of every selector that is set; the base model is nothing of both."""
    if body.adapter_source in ("s3", "pbase"):
        raise InvalidRequestError(
            f"adapter_source is {body.adapter_source!r}, but a request loads no adapters: "
            "name a loaded one, GET /v1/models lists them"
        )
    if body.adapter_id is not None and body.merged_adapters is not None:
        raise InvalidRequestError("adapter_id and merged_adapters are both set, set one of them")

    def one(name: str) -> Weights:
        return {} if name in (LORAX_BASE_MODEL, *state.served_names) else {registered_name(name): 1.0}

    if body.adapters:
        yield "adapters", _summed(body.adapters.items())
    for field in ("adapter", "adapter_id", "lora_name", "lora_request", "lora_path", "lora"):
        match getattr(body, field):
            case None:
                pass
            case str() as name:
                yield field, one(name)
            case dict() as weights:
                yield field, _summed(weights.items())
            case LoraRequest(lora_name=name):
                yield field, one(name)
            case list() as entries if field == "lora_path":
                common = _same_for_all(entries, num_prompts)
                yield field, {} if common is None else one(common)
            case scales:
                yield field, _summed((_numbered(state, caller, scale.id), scale.scale) for scale in scales)
    if body.merged_adapters is not None:
        yield "merged_adapters", _merged(body.merged_adapters)


def _summed(pairs: Iterable[tuple[str, float]]) -> Weights:
    total: Weights = {}
    for name, weight in pairs:
        total[registered_name(name)] = total.get(registered_name(name), 0.0) + weight
    return total


def _merged(merged: MergedAdapters) -> Weights:
    if merged.merge_strategy not in (None, "linear"):
        raise InvalidRequestError(
            f"merge_strategy is {merged.merge_strategy!r}, only linear is supported: adapters are summed "
            "while they run, and ties and dare would need a new adapter made of them"
        )
    if len(merged.ids) != len(merged.weights):
        raise InvalidRequestError(
            f"merged_adapters has {len(merged.ids)} ids and {len(merged.weights)} weights, "
            "give as many of both"
        )
    return _summed(zip(merged.ids, merged.weights, strict=True))


def _same_for_all(names: list[str | None], num_prompts: int) -> str | None:
    if len(names) != num_prompts:
        raise InvalidRequestError(f"lora_path has {len(names)} names for {num_prompts} prompts")
    if any(name != names[0] for name in names):
        raise InvalidRequestError("lora_path names different adapters, send a request for each")
    return names[0]


def _numbered(state: HttpState, caller: Caller, number: int | str) -> str:
    if isinstance(number, str):
        return number
    names = state.adapters_at_start
    if not 0 <= number < len(names) or not caller.may_use(names[number]):
        raise AdapterNotFoundError(
            f"lora id {number} is no adapter of yours, give a name, GET /v1/models lists them"
        )
    return names[number]


def _text(spec: Weights) -> str:
    """Short, and on one line whatever the names are."""
    return (
        " + ".join(f"{name!r:.100} * {weight:g}" for name, weight in list(spec.items())[:3])
        or "the base model"
    )
