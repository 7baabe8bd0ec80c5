"""Tools as text, for chat templates that know none: in the form in which Hermes and Qwen models write calls.

Knows messages and tools. Knows nothing of tokenizers.
"""

from __future__ import annotations

import json
from typing import Any


def with_tools_as_text(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages of system, user and assistant alone, with the tools before all else.

    Args:
        messages: as chat templates read them, calls and results included.
        tools: in OpenAI's form; none where nothing may be called any more.
    """
    written = [_written(message) for message in messages]
    if not tools:
        return written
    system = written.pop(0)["content"] + "\n\n" if written and written[0]["role"] == "system" else ""
    return [{"role": "system", "content": system + _told(tools)}, *written]


def _told(tools: list[dict[str, Any]]) -> str:
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        "These functions can be called, one JSON object each:\n"
        f"<tools>\n{functions}\n</tools>\n"
        "To call one, write its name and its arguments as JSON between these marks, and nothing behind them:\n"
        '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>\n'
        "The result comes in the next message. Where no function helps, answer with text."
    )


def _written(message: dict[str, Any]) -> dict[str, Any]:
    role, content = message["role"], message["content"]
    if role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    if "tool_calls" in message:
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
        content = "\n".join(
            [*([content] if content else []), *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
        )
    return {"role": role, "content": content}
