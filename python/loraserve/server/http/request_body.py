"""`RequestBody`: a JSON object in which every field means something here, or is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from loraserve.validation.did_you_mean import did_you_mean

NoEffect: TypeAlias = frozenset[str]
Neutral: TypeAlias = dict[str, tuple[Any, ...]]
Elsewhere: TypeAlias = dict[str, str]

Text: TypeAlias = Annotated[str, Field(max_length=16 * 2**20)]

MAX_TEXT_PARTS = 1024  # of one message
MAX_CALLS = 1024  # of one message
MAX_PROBLEMS = 3
MAX_SHOWN_CHARS = 100


def _document(schema: dict[str, Any], cls: type[RequestBody]) -> None:
    """Puts the fields that are not the model's own into the OpenAPI document."""
    properties = schema.setdefault("properties", {})
    for name in sorted(cls.no_effect - cls.model_fields.keys()):
        properties[name] = {"description": "Taken, and changes nothing here."}
    for name, values in sorted(cls.neutral.items()):
        if name not in cls.model_fields:
            properties[name] = {"enum": [None, *values], "description": "Not supported here."}


ReasoningEffort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
"""OpenAI's and Anthropic's; a chat template that knows others is given them by chat_template_kwargs."""


class RequestBody(BaseModel):
    """Beside the fields of the model, other servers' fields are taken where they can't change an answer.

    no_effect: names of fields that have any value and change nothing here.
    neutral: fields that are not supported → values that ask for nothing; null is always one.
    elsewhere: names that clients of other servers write → what to write here instead.
    reasons: neutral fields → why they are not supported, where that is not plain.
    """

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, protected_namespaces=(), json_schema_extra=_document
    )

    no_effect: ClassVar[NoEffect] = frozenset()
    neutral: ClassVar[Neutral] = {}
    elsewhere: ClassVar[Elsewhere] = {}
    reasons: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_foreign_fields(cls, values: Any) -> Any:
        """The model's own fields; what else is in the body has no effect or is refused."""
        if not isinstance(values, dict):
            return values
        own = _own_names(cls)
        problems: list[InitErrorDetails] = []
        for name in values.keys() - own:
            problem = cls._problem(name, values[name])
            if problem is not None and len(problems) < MAX_PROBLEMS:
                location = (name[:MAX_SHOWN_CHARS],)
                problems.append(InitErrorDetails(type=problem, loc=location, input=None))
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return {name: value for name, value in values.items() if name in own}

    @classmethod
    def _problem(cls, name: str, value: Any) -> PydanticCustomError | None:
        if name in cls.no_effect or (name in cls.neutral and _is_neutral(value, cls.neutral[name])):
            return None
        if name in cls.neutral:
            others = " or ".join(map(json.dumps, cls.neutral[name]))
            return PydanticCustomError(
                "not_supported",
                "not supported here, leave it out{others}{reason}",
                {
                    "others": f" or set it to {others}" if others else "",
                    "reason": f": {reason}" if (reason := cls.reasons.get(name)) else "",
                },
            )
        known = [*_own_names(cls), *cls.no_effect, *cls.neutral]
        return PydanticCustomError(
            "unknown_field", "unknown field{hint}", {"hint": did_you_mean(name, known, cls.elsewhere)}
        )


@cache
def _own_names(cls: type[RequestBody]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in cls.model_fields.items())


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    return value is None or any(type(value) is type(one) and value == one for one in neutral)
