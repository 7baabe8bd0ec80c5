"""Answers as Anthropic's /v1/messages writes them: blocks of thinking, text and tool use.

Knows parts of an answer. Knows nothing of bodies.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from moeflow.server.reading.answer_reader import Part, Reasoning, Text, ToolCall
from moeflow.server.translations.form import joined
from moeflow.server.wire.errors import HttpError, dump

if TYPE_CHECKING:
    from moeflow.engine.request import Completion
    from moeflow.server.endpoints.answering import Usage

_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: HttpError, request_id: str) -> dict[str, Any]:
    """Return an error in Anthropic's form."""
    kind = _ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}


class MessagesForm:
    """Writes one answer.

    Args:
        id: of the message; its calls are named after it.
        model: its name.
    """

    def __init__(self, id: str, model: str) -> None:
        self._id = id
        self._model = model
        self._open: type[Part] | None = None  # the kind of the block under way
        self._index = -1
        self._num_calls = 0

    def begin(self, usage: Usage) -> list[bytes]:
        """Return the beginning of a message without content."""
        message = {**self._message([], None, None), "usage": {**_usage(usage), "output_tokens": 0}}
        return [_event("message_start", message=message)]

    def part(self, part: Part) -> list[bytes]:
        """Return what a part adds: the begin of a block where it is of another kind, and a delta."""
        events = []
        if isinstance(part, ToolCall) or self._open is not type(part):
            events = [*self._stop(), self._start(part)]
        if isinstance(part, ToolCall):
            delta = {"type": "input_json_delta", "partial_json": part.arguments}
        elif isinstance(part, Reasoning):
            delta = {"type": "thinking_delta", "thinking": part.text}
        else:
            delta = {"type": "text_delta", "text": part.text}
        return [*events, _event("content_block_delta", index=self._index, delta=delta)]

    def end(self, completion: Completion, usage: Usage) -> list[bytes]:
        """Return the end of the message."""
        reason, stop = _reason(completion, calls=self._num_calls)
        delta = {"stop_reason": reason, "stop_sequence": stop}
        return [*self._stop(), _event("message_delta", delta=delta, usage=_usage(usage)), _event("message_stop")]

    def failed(self, error: HttpError, request_id: str) -> list[bytes]:
        """Return an error event."""
        body = error_body(error, request_id)
        return [f"event: error\ndata: {dump(body)}\n\n".encode()]

    def whole(self, parts: list[Part], completion: Completion, usage: Usage) -> dict[str, Any]:
        """Return the message."""
        content = [self._block(part) for part in joined(parts)]
        return {**self._message(content, *_reason(completion, calls=self._num_calls)), "usage": _usage(usage)}

    def _message(self, content: list[dict[str, Any]], reason: str | None, stop: str | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
        }

    def _start(self, part: Part) -> bytes:
        """Begin a block, whose content comes in deltas."""
        self._open = type(part)
        self._index += 1
        empty = part._replace(arguments="{}") if isinstance(part, ToolCall) else part._replace(text="")
        return _event("content_block_start", index=self._index, content_block=self._block(empty))

    def _stop(self) -> list[bytes]:
        was_open, self._open = self._open, None
        return [] if was_open is None else [_event("content_block_stop", index=self._index)]

    def _block(self, part: Part) -> dict[str, Any]:
        if isinstance(part, Text):
            return {"type": "text", "text": part.text}
        if isinstance(part, Reasoning):
            return {"type": "thinking", "thinking": part.text, "signature": ""}
        self._num_calls += 1
        id = f"toolu_{self._id.removeprefix('msg_')}_{self._num_calls}"
        return {"type": "tool_use", "id": id, "name": part.name, "input": json.loads(part.arguments)}


def _reason(completion: Completion, *, calls: int) -> tuple[str, str | None]:
    if calls:
        return "tool_use", None
    if completion.finish_reason == "length":
        return "max_tokens", None
    if completion.stop is not None:
        return "stop_sequence", completion.stop
    return "end_turn", None


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


def _event(name: str, **content: Any) -> bytes:
    return f"event: {name}\ndata: {dump({'type': name, **content})}\n\n".encode()
