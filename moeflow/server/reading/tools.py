"""The tools of a request, and whether its answer must call one.

Knows OpenAI's form of tools. Knows nothing of prompts or answers.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from moeflow.batch.messages import refuse_unknown, short
from moeflow.errors import ConfigError
from moeflow.hf.encoding import check_text

FIELDS = ("tools", "tool_choice", "parallel_tool_calls")
_MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}", re.ASCII)
_CHOICES = ("auto", "none", "required")


class Tools(NamedTuple):
    """What an answer may call.

    Args:
        tools: in OpenAI's form, of different names.
        choice: "auto", "none", "required" (one or more calls and no text), or the name of the one that is called.
        parallel: whether an answer may have several calls.
    """

    tools: list[dict[str, Any]]
    choice: str = "auto"
    parallel: bool = True

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the prompt tells of."""
        if self.choice in _CHOICES:
            return [] if self.choice == "none" else self.tools
        return [tool for tool in self.tools if tool["function"]["name"] == self.choice]

    @property
    def schema(self) -> dict[str, Any] | None:
        """What an answer must be that must call: a list of {"name", "arguments"}; None where it need not."""
        if self.choice in ("auto", "none"):
            return None
        calls = [_call_schema(tool["function"]) for tool in self.offered]
        most = {} if self.parallel and self.choice == "required" else {"maxItems": 1}
        return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most}


def _call_schema(function: dict[str, Any]) -> dict[str, Any]:
    properties = {"name": {"const": function["name"]}, "arguments": function.get("parameters") or {"type": "object"}}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def read_tools(body: dict[str, Any]) -> Tools:
    """Return the tools of a body; none at all where it has none.

    Raises:
        ConfigError: a tool is no function, has a name twice, or the choice is none of them.
    """
    given = body.get("tools") or []
    if not isinstance(given, list) or len(given) > _MAX_TOOLS:
        raise ConfigError(f"tools is {short(given)}; it must be a list of at most {_MAX_TOOLS} functions")
    tools = [_read_tool(f"tool {number}", tool) for number, tool in enumerate(given, 1)]
    names = [tool["function"]["name"] for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"tools has {twice!r} twice; give each function a name of its own")
    parallel = body.get("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        raise ConfigError(f"parallel_tool_calls is {short(parallel)}; it must be true or false")
    choice = _read_choice(body.get("tool_choice"), names)
    return Tools(tools, choice, parallel is not False)


def _read_choice(choice: Any, names: list[str]) -> str:
    if choice is None:
        return "auto"
    if isinstance(choice, dict) and choice.get("type") == "function":
        refuse_unknown(choice, ("type", "function", "name"), "tool_choice")
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, dict) else None
        if name in names:
            return str(name)
        raise ConfigError(f"tool_choice names {short(name)}; tools has {', '.join(names) or 'none'}")
    if choice not in _CHOICES:
        raise ConfigError(f"tool_choice is {short(choice)}; it must be {', '.join(_CHOICES)} or the name of a function")
    if choice == "required" and not names:
        raise ConfigError("tool_choice is 'required', and there are no tools to call")
    return str(choice)


def _read_tool(place: str, tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type", "function") != "function":
        found = tool.get("type") if isinstance(tool, dict) else tool
        raise ConfigError(f'tools has {short(found)} as {place}; only functions, as {{"type": "function"}}, are known')
    refuse_unknown(tool, ("type", "function"), f"{place} of tools")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise ConfigError(f"tools has {short(function)} as function of {place}; it must be an object")
    refuse_unknown(function, ("name", "description", "parameters", "strict"), f"the function of {place}")
    name, description, parameters = (function.get(key) for key in ("name", "description", "parameters"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"tools has {short(name)} as the name of {place}; allowed are 1 to 64 letters, digits, _, - and ."
        )
    if description is not None and not isinstance(description, str):
        raise ConfigError(f"tools has {short(description)} as description of {name}; it must be a text")
    if parameters is not None and not isinstance(parameters, dict):
        raise ConfigError(f"tools has {short(parameters)} as parameters of {name}; they must be a JSON schema")
    read = {
        "name": name,
        "description": check_text(description or "", f"the description of {name}"),
        "parameters": parameters or {"type": "object", "properties": {}},
    }
    return {"type": "function", "function": read}
