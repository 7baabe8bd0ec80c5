"""A body of /v1/responses as one of /v1/chat/completions.

Knows both forms. Nothing is stored: what would need an earlier response is refused.
"""

from __future__ import annotations

from typing import Any

from moeflow.batch.messages import refuse_unknown, short
from moeflow.errors import ConfigError
from moeflow.server.translations.fields import given, list_of, object_of, text_of

_WITHOUT_EFFECT = (
    "model", "metadata", "user", "store", "service_tier", "truncation", "include", "reasoning", "safety_identifier",
    "prompt_cache_key", "background",
)  # fmt: skip
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "stream", "parallel_tool_calls", "priority")
FIELDS = (
    *("input", "instructions", "max_output_tokens", "text", "tools", "tool_choice", "top_logprobs"),
    *_SAMPLING,
    *_WITHOUT_EFFECT,
)
_TEXTS = ("input_text", "output_text", "text")


def chat_body(body: dict[str, Any]) -> dict[str, Any]:
    """Return the same request as chat completions take it.

    Raises:
        ConfigError: a field is unknown or has another form, or it goes on with a stored response.
    """
    refuse_unknown(body, FIELDS, "the request")
    if body.get("background"):
        raise ConfigError("background is true; a response is there when its request ends, so leave it out")
    messages: list[dict[str, Any]] = []
    if body.get("instructions") is not None:
        messages.append({"role": "system", "content": text_of(body["instructions"], "instructions")})
    said = body.get("input")
    if isinstance(said, str):
        messages.append({"role": "user", "content": said})
    else:
        for place, item in enumerate(list_of(said, "input"), 1):
            _add(messages, item, f"item {place} of input")
    chat = {"messages": messages, **given(body, model="model", max_tokens="max_output_tokens")}
    chat |= given(body, **{name: name for name in _SAMPLING})
    if body.get("tools"):
        chat["tools"] = [_tool(tool, place) for place, tool in enumerate(list_of(body["tools"], "tools"), 1)]
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    if choice is not None:
        chat["tool_choice"] = choice
    wanted = object_of(body.get("text") or {}, "text", ("format", "verbosity")).get("format")
    if wanted is not None:
        chat["response_format"] = _format(wanted)
    return chat


def _add(messages: list[dict[str, Any]], item: Any, name: str) -> None:
    """Add an item to the messages; calls join the answer before them."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if kind == "message":
        object_of(item, name, ("type", "role", "content", "id", "status", "phase"))
        messages.append({"role": item.get("role"), "content": _content(item.get("content"), name)})
    elif kind == "function_call":
        object_of(item, name, ("type", "call_id", "name", "arguments", "id", "status"))
        call = {"id": item.get("call_id"), "type": "function"}
        call["function"] = {"name": item.get("name"), "arguments": item.get("arguments")}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        object_of(item, name, ("type", "call_id", "output", "id", "status"))
        content = _content(item.get("output"), name)
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
    elif kind != "reasoning":  # of an earlier answer, which no model reads again
        found = short(item if kind is None else kind)
        raise ConfigError(f"{name} is {found}; messages, function_call and function_call_output can be read")


def _content(content: Any, name: str) -> str | list[dict[str, Any]]:
    """Return a content as chat completions take it: a text, or parts where it has images."""
    if isinstance(content, str):
        return content
    parts = []
    for part in list_of(content, f"the content of {name}"):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind == "refusal":
            parts.append({"type": "text", "text": text_of(part.get("refusal"), f"the refusal of {name}")})
        elif kind in _TEXTS:
            parts.append({"type": "text", "text": text_of(part.get("text"), f"the text of {name}")})
        elif kind == "input_image":
            parts.append(_image(part, name))
        else:
            raise ConfigError(f"input has {short(kind)} in {name}; only texts, and images of a user, can be read")
    has_images = any(part["type"] == "image_url" for part in parts)
    return parts if has_images else "".join(part["text"] for part in parts)


def _image(part: dict[str, Any], name: str) -> dict[str, Any]:
    if part.get("file_id") is not None:
        raise ConfigError(f"input has a file_id in an image of {name}; no files are stored here: send it as image_url")
    object_of(part, f"an image of {name}", ("type", "image_url", "detail", "file_id"))
    url = text_of(part.get("image_url"), f"the image_url of {name}")
    return {"type": "image_url", "image_url": {"url": url, "detail": part.get("detail")}}


def _tool(tool: Any, place: int) -> Any:
    """Return a function in the form of chat completions; what is none is refused there."""
    if not isinstance(tool, dict) or tool.get("type") != "function" or "function" in tool:
        return tool
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _format(wanted: Any) -> dict[str, Any]:
    wanted = object_of(wanted, "format of text", ("type", "name", "schema", "strict", "description"))
    if wanted.get("type") != "json_schema":
        return {"type": wanted.get("type")}
    return {"type": "json_schema", "json_schema": {name: wanted[name] for name in wanted if name != "type"}}
