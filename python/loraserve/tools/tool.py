"""`Tool` and `ToolOptions`: functions that an answer may call, and which of them it may or must."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from loraserve.errors import InvalidRequestError
from loraserve.validation.did_you_mean import did_you_mean
from loraserve.validation.values import check_bool, depth_exceeds

ToolMode: TypeAlias = Literal["none", "auto", "required"]

MODES: tuple[ToolMode, ...] = get_args(ToolMode)
MAX_TOOLS = 128
MAX_DESCRIPTION_CHARS = 16 * 1024
MAX_SCHEMA_CHARS = 64 * 1024
MAX_TOOLS_CHARS = 256 * 1024  # of all together
MAX_SCHEMA_DEPTH = 64
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_FIELDS = ("name", "description", "parameters", "strict", "return")


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function; checked when built.

    Args:
        name: up to 128 letters, digits, `_`, `-` and `.`.
        description: for the model.
        parameters: JSON schema of its arguments, an object; without there are none.
        strict: whether arguments are made to fit `parameters` also where the model may answer freely.
        returns: what it gives back, as transformers describes it to templates.

    Raises:
        InvalidRequestError: a value is too large, or not of its type.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = field(default=None, hash=False)
    strict: bool = False
    returns: Any = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InvalidRequestError(
                f"name of a tool is {self.name!r:.150}, it must be 1 to 128 letters, digits, _, - and ."
            )
        where = f"tool {self.name!r}"
        if self.description is not None and not isinstance(self.description, str):
            raise InvalidRequestError(f"{where}: description is {self.description!r:.100}, it must be text")
        if len(self.description or "") > MAX_DESCRIPTION_CHARS:
            raise InvalidRequestError(
                f"{where}: description has {len(self.description or '')} characters, the limit is "
                f"{MAX_DESCRIPTION_CHARS}"
            )
        check_bool(f"strict of {where}", self.strict)
        if self.parameters is not None:
            _check_schema(where, self.parameters)

    @classmethod
    def from_fields(cls, fields: Any) -> Tool:
        """From OpenAI's form, `{"type": "function", "function": {…}}`, or the function alone."""
        if isinstance(fields, Tool):
            return fields
        if not isinstance(fields, Mapping):
            raise InvalidRequestError(f"a tool is {fields!r:.100}, it must be an object")
        kind = fields.get("type", "function")
        if kind != "function":
            raise InvalidRequestError(f"a tool is of type {kind!r:.100}, only functions are supported")
        function = fields.get("function", fields)
        if not isinstance(function, Mapping):
            raise InvalidRequestError(f"function of a tool is {function!r:.100}, it must be an object")
        given = {name: value for name, value in function.items() if value is not None and name != "type"}
        for name in given:
            if name not in _FIELDS:
                hint = did_you_mean(str(name), _FIELDS)
                raise InvalidRequestError(f"a tool has the unknown field {name!r:.100}{hint}")
        if "name" not in given:
            raise InvalidRequestError("a tool has no name, give it one")
        if "return" in given:
            given["returns"] = given.pop("return")
        return cls(**given)

    def for_template(self) -> dict[str, Any]:
        """As chat templates are given it."""
        function: dict[str, Any] = {"name": self.name}
        for name, value in (
            ("description", self.description),
            ("parameters", self.parameters),
            ("return", self.returns),
        ):
            if value is not None:
                function[name] = value
        return {"type": "function", "function": function}


@dataclass(frozen=True, kw_only=True)
class ToolOptions:
    """What of its tools a chat's answer may call; checked when built by `from_fields`.

    Args:
        tools: all that the model is told of.
        mode: none calls nothing, auto leaves it to the model, required calls at least one.
        allowed: names of those that may be called.
        parallel: whether several calls may be made in one answer.
    """

    tools: tuple[Tool, ...] = ()
    mode: ToolMode = "auto"
    allowed: frozenset[str] = frozenset()
    parallel: bool = True

    @classmethod
    def from_fields(
        cls, tools: Iterable[Any] | None, choice: Any = None, parallel: bool | None = None
    ) -> ToolOptions:
        """From OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`.

        Raises:
            InvalidRequestError: a tool is malformed, two have one name, there are too many, or `choice` names
                what is none of them.
        """
        if tools is not None and (isinstance(tools, str | Mapping) or not isinstance(tools, Sequence)):
            raise InvalidRequestError(f"tools is {tools!r:.100}, it must be a list")
        if len(tools or ()) > MAX_TOOLS:
            raise InvalidRequestError(f"tools has {len(tools or ())} entries, the limit is {MAX_TOOLS}")
        built = tuple(Tool.from_fields(one) for one in tools or ())
        names = [tool.name for tool in built]
        for name in names:
            if names.count(name) > 1:
                raise InvalidRequestError(f"two tools are called {name!r}, give each a name of its own")
        size = sum(len(json.dumps(tool.for_template())) for tool in built)
        if size > MAX_TOOLS_CHARS:
            raise InvalidRequestError(f"tools have {size} characters, the limit is {MAX_TOOLS_CHARS}")
        mode, allowed = _choice(choice, names)
        if parallel is not None:
            check_bool("parallel_tool_calls", parallel)
        if not built and (mode == "required" or allowed):
            raise InvalidRequestError("tool_choice asks for a call, but there are no tools: give some")
        return cls(
            tools=built,
            mode=mode,
            allowed=frozenset(names if allowed is None else allowed),
            parallel=parallel is not False,
        )

    @property
    def may_call(self) -> bool:
        """Whether an answer is looked through for calls."""
        return bool(self.tools) and self.mode != "none"

    @property
    def is_forced(self) -> bool:
        """Whether a grammar says which calls come or what is in them, of all if one tool is strict."""
        if not self.may_call:
            return False
        is_free = self.mode == "auto" and len(self.allowed) == len(self.tools)
        return not is_free or any(tool.strict for tool in self.tools)

    @property
    def callable_tools(self) -> list[Tool]:
        """Those that may be called, in the order given."""
        return [tool for tool in self.tools if tool.name in self.allowed]


def _choice(choice: Any, names: Sequence[str]) -> tuple[ToolMode, list[str] | None]:
    """(mode, names allowed or None for all)."""
    if choice is None:
        return "auto", None
    if isinstance(choice, str):
        if choice in MODES:
            return choice, None
        raise InvalidRequestError(
            f"tool_choice is {choice!r:.100}, it must be none, auto, required or an object that names a "
            f"function{did_you_mean(choice, MODES)}"
        )
    if not isinstance(choice, Mapping):
        raise InvalidRequestError(f"tool_choice is {choice!r:.100}, it must be text or an object")
    kind = choice.get("type")
    if kind == "function" or (kind is None and "name" in choice):
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        return "required", [_known(name, names)]
    if kind == "allowed_tools":
        inner = choice.get("allowed_tools", choice)
        inner = inner if isinstance(inner, Mapping) else {}
        mode, tools = inner.get("mode", "auto"), inner.get("tools")
        if mode not in ("auto", "required"):
            raise InvalidRequestError(f"mode of allowed_tools is {mode!r:.100}, it must be auto or required")
        if not isinstance(tools, Sequence) or isinstance(tools, str) or not 1 <= len(tools) <= MAX_TOOLS:
            raise InvalidRequestError("tools of allowed_tools must be a list of functions, at least one")
        return mode, [_known(_name_in(tool), names) for tool in tools]
    raise InvalidRequestError(f"tool_choice is of type {kind!r:.100}, it must be function or allowed_tools")


def _name_in(tool: Any) -> Any:
    if not isinstance(tool, Mapping):
        return tool
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, Mapping) else None


def _known(name: Any, names: Sequence[str]) -> str:
    if name in names:
        return str(name)
    hint = did_you_mean(name, names) if isinstance(name, str) else ""
    raise InvalidRequestError(f"tool_choice names {name!r:.150}, which is none of the tools{hint}")


def _check_schema(where: str, schema: Any) -> None:
    if not isinstance(schema, Mapping):
        raise InvalidRequestError(f"{where}: parameters is {schema!r:.100}, it must be a JSON schema")
    if schema.get("type", "object") != "object":
        raise InvalidRequestError(
            f"{where}: parameters is a schema of type {schema['type']!r:.100}, it must be an object's"
        )
    if depth_exceeds(schema, MAX_SCHEMA_DEPTH):
        raise InvalidRequestError(f"{where}: parameters is nested deeper than {MAX_SCHEMA_DEPTH}")
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{where}: parameters is no JSON: {error}") from None
    if size > MAX_SCHEMA_CHARS:
        raise InvalidRequestError(
            f"{where}: parameters has {size} characters, the limit is {MAX_SCHEMA_CHARS}"
        )
