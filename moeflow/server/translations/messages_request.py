"""A body of Anthropic's /v1/messages as one of /v1/chat/completions.

Knows both forms.
"""

from __future__ import annotations

import json
from typing import Any

from moeflow.batch.messages import refuse_unknown, short
from moeflow.errors import ConfigError
from moeflow.server.translations.fields import given, list_of, object_of, text_of

_SAMPLING = ("temperature", "top_p", "top_k", "stream", "priority")
_WITHOUT_EFFECT = ("model", "metadata", "service_tier", "thinking", "container")
FIELDS = (
    *("messages", "system", "max_tokens", "stop_sequences", "tools", "tool_choice", "output_config"),
    *_SAMPLING,
    *_WITHOUT_EFFECT,
)
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_body(body: dict[str, Any]) -> dict[str, Any]:
    """Return the same request as chat completions take it.

    Raises:
        ConfigError: a field is unknown or has another form, or there is no max_tokens.
    """
    refuse_unknown(body, FIELDS, "the request")
    if body.get("max_tokens") is None:
        raise ConfigError("max_tokens is missing; it must be a whole number, at least 1")
    messages: list[dict[str, Any]] = []
    if body.get("system"):
        messages.append({"role": "system", "content": _text(body["system"], "system")})
    for place, message in enumerate(list_of(body.get("messages"), "messages"), 1):
        _add(messages, object_of(message, f"message {place}", ("role", "content")), f"message {place}")
    chat = {"messages": messages, **given(body, model="model", max_tokens="max_tokens", stop="stop_sequences")}
    chat |= given(body, **{name: name for name in _SAMPLING})
    if body.get("tools"):
        chat["tools"] = [_tool(tool, place) for place, tool in enumerate(list_of(body["tools"], "tools"), 1)]
    if body.get("tool_choice") is not None:
        chat |= _choice(body["tool_choice"])
    wanted = object_of(body.get("output_config") or {}, "output_config", ("format", "effort")).get("format")
    if wanted is not None:
        chat["response_format"] = _format(wanted)
    return chat


def _add(messages: list[dict[str, Any]], message: dict[str, Any], name: str) -> None:
    """Add a message: its calls are the assistant's, each result is a message of its own before what the user says."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise ConfigError(f"{name} has the role {short(role)}; it must be user or assistant")
    if isinstance(content, str):
        messages.append({"role": role, "content": content})
        return
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for block in list_of(content, f"the content of {name}"):
        kind = block.get("type") if isinstance(block, dict) else block
        if kind == "text":
            parts.append({"type": "text", "text": text_of(block.get("text"), f"a text of {name}")})
        elif kind == "image" and role == "user":
            parts.append(_image(block, name))
        elif kind == "tool_use" and role == "assistant":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result" and role == "user":
            result = _text(block.get("content") or "", f"a result in {name}")
            messages.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": result})
        elif kind not in ("thinking", "redacted_thinking"):  # of an earlier answer, which no model reads again
            raise ConfigError(f"messages has {short(kind)} in {name}; only texts, and images of a user, can be read")
    if parts or calls:
        told = {"role": role, "content": parts if role == "user" else "".join(part["text"] for part in parts)}
        messages.append(told | ({"tool_calls": calls} if calls else {}))


def _image(block: dict[str, Any], name: str) -> dict[str, Any]:
    """Return an image as a part of chat completions; an address is refused there."""
    object_of(block, f"an image of {name}", ("type", "source", "cache_control"))
    source = object_of(block.get("source"), f"the source of an image of {name}", ("type", "media_type", "data", "url"))
    if source.get("type") == "base64":
        kind = text_of(source.get("media_type"), f"the media_type of an image of {name}")
        url = f"data:{kind};base64,{text_of(source.get('data'), f'the data of an image of {name}')}"
    elif source.get("type") == "url":
        url = text_of(source.get("url"), f"the url of an image of {name}")
    else:
        raise ConfigError(f"messages has the source {short(source.get('type'))} in {name}; it must be base64")
    return {"type": "image_url", "image_url": {"url": url}}


def _text(content: Any, name: str) -> str:
    """Return the text of a content that holds nothing else."""
    if isinstance(content, str):
        return content
    blocks = list_of(content, name)
    for block in blocks:
        if not isinstance(block, dict) or block.get("type") != "text":
            found = block.get("type") if isinstance(block, dict) else block
            raise ConfigError(f"{name} has {short(found)}; this model reads only text")
    return "".join(text_of(block.get("text"), f"a text of {name}") for block in blocks)


def _tool(tool: Any, place: int) -> dict[str, Any]:
    name = f"tool {place}"
    if isinstance(tool, dict) and tool.get("type", "custom") != "custom":
        raise ConfigError(f"tools has {short(tool['type'])} as {name}; only tools of your own are known")
    allowed = ("type", "name", "description", "input_schema", "cache_control", "strict")
    tool = object_of(tool, f"{name} of tools", allowed)
    return {
        "type": "function",
        "function": given(tool, name="name", description="description", parameters="input_schema"),
    }


def _format(wanted: Any) -> dict[str, Any]:
    wanted = object_of(wanted, "format of output_config", ("type", "schema"))
    if wanted.get("type") != "json_schema" or not isinstance(wanted.get("schema"), dict):
        allowed = '{"type": "json_schema", "schema": {...}}'
        raise ConfigError(f"format of output_config is {short(wanted)}; it must be {allowed}")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted["schema"]}}


def _choice(choice: Any) -> dict[str, Any]:
    choice = object_of(choice, "tool_choice", ("type", "name", "disable_parallel_tool_use"))
    kind = choice.get("type")
    chosen: Any = _CHOICES.get(kind) if isinstance(kind, str) else None
    if kind == "tool":
        chosen = {"type": "function", "function": {"name": choice.get("name")}}
    if chosen is None:
        raise ConfigError(f"tool_choice is {short(kind)}; it must be auto, any, none or tool")
    return {"tool_choice": chosen, "parallel_tool_calls": not choice.get("disable_parallel_tool_use")}
