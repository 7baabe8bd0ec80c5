"""The messages of a request with tools: calls that the model made, and what they returned.

Knows OpenAI's form of messages, and that of chat templates. Knows nothing of tokenizers.
"""

from __future__ import annotations

import json
from typing import Any

from moeflow.batch.messages import IMAGE_PART, read_messages, refuse_unknown, short
from moeflow.errors import ConfigError
from moeflow.hf.encoding import check_text
from moeflow.server.reading.images import ImageParts

_SYSTEM = ("developer",)  # OpenAI's newer word


def read_conversation(messages: object, images: ImageParts | None = None) -> list[dict[str, Any]]:
    """Return messages as chat templates read them: arguments of calls as objects, contents as text.

    Args:
        messages: what a request's "messages" hold.
        images: reads its image parts; None where only texts are read. A content that has some is a list of parts, as
            of `read_messages`.

    Raises:
        ConfigError: a message is none, or a result belongs to no call.
    """
    if not isinstance(messages, list):
        return read_messages(messages)  # it says what is wrong
    plain: list[Any] = []
    calls: dict[int, list[dict[str, Any]]] = {}
    results: dict[int, str] = {}  # place: id of the call
    for place, message in enumerate(messages, 1):
        if isinstance(message, dict):
            role, name = message.get("role"), f"message {place}"
            message = {**message, "role": "system"} if role in _SYSTEM else dict(message)
            reasoning = message.pop("reasoning_content", None) if role == "assistant" else None  # of earlier answers
            if reasoning is not None and not isinstance(reasoning, str):
                raise ConfigError(f"{name} has {short(reasoning)} as reasoning_content; it must be a text")
            if role == "assistant" and message.get("tool_calls"):
                calls[place] = _read_calls(name, message.pop("tool_calls"))
                message["content"] = message.get("content") or ""
            elif role == "tool":
                id = message.pop("tool_call_id", None)
                if not any(call["id"] == id for made in calls.values() for call in made):
                    raise ConfigError(f"{name} is the result of {short(id)}, which no message before it has called")
                if isinstance(message.get("content"), list) and any(
                    isinstance(part, dict) and part.get("type") == IMAGE_PART for part in message["content"]
                ):
                    raise ConfigError(f"messages has an image in the result {name}; say it in a message of a user")
                results[place] = id
                message["role"] = "user"  # to be read like one
        plain.append(message)
    read = read_messages(plain, None if images is None else images.read)
    names = {call["id"]: call["function"]["name"] for made in calls.values() for call in made}
    for place, message in enumerate(read, 1):
        if place in calls:
            message["tool_calls"] = calls[place]
        if place in results:
            message |= {"role": "tool", "tool_call_id": results[place], "name": names[results[place]]}
    return read


def _read_calls(name: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ConfigError(f"{name} has {short(calls)} as tool_calls; they must be a list")
    read = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ConfigError(f'{name} has the call {short(call)}; it must be {{"id", "type", "function"}}')
        refuse_unknown(call, ("id", "type", "function", "index"), f"a call of {name}")
        arguments = function.get("arguments") or "{}"
        try:
            found = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ConfigError(f"{name} calls {function['name']} with {short(arguments)}; it must be a JSON object")
        check_text(str(arguments), name)
        called = {"name": function["name"], "arguments": found}
        read.append({"id": call.get("id"), "type": "function", "function": called})
    return read
