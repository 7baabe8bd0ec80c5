"""Answers as OpenAI's /v1/responses writes them: items of reasoning, a message, and calls of functions.

Knows parts of an answer, and what a response repeats of its request. Knows nothing of prompts.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from moeflow.server.reading.answer_reader import Part, Reasoning, ToolCall
from moeflow.server.translations.form import joined
from moeflow.server.wire.errors import HttpError, dump

if TYPE_CHECKING:
    from moeflow.engine.request import Completion
    from moeflow.server.endpoints.answering import Usage

_REPEATED: dict[str, Any] = {
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True, "temperature": None,
    "tool_choice": "auto", "tools": [], "top_p": None, "text": {"format": {"type": "text"}}, "user": None,
}  # fmt: skip


class ResponsesForm:
    """Writes one response.

    Args:
        id: of the response; its items are named after it.
        model: its name.
        body: of the request.
    """

    def __init__(self, id: str, model: str, body: dict[str, Any]) -> None:
        self._id = id
        self._model = model
        self._repeated = {name: body.get(name) or default for name, default in _REPEATED.items()}
        self._created = int(time.time())
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the item under way
        self._number = -1  # of the last event

    def begin(self, usage: Usage) -> list[bytes]:
        """Return the events of a response without items."""
        response = self._response("in_progress")
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def part(self, part: Part) -> list[bytes]:
        """Return what a part adds: the begin of an item where it is of another kind, and a delta."""
        events: list[bytes] = []
        item = self._item(part)
        if isinstance(part, ToolCall):
            events += self._close()
            self._open = item
            events.append(self._added({**item, "arguments": "", "status": "in_progress"}))
            return [*events, self._event("response.function_call_arguments.delta", item, delta=part.arguments)]
        if self._open is None or self._open["type"] != item["type"]:
            events += self._close()
            self._open = self._item(part._replace(text=""))
            events.append(self._added({**self._open, "status": "in_progress", "content": []}))
            empty = self._open["content"][0]
            events.append(self._event("response.content_part.added", self._open, content_index=0, part=empty))
        self._open["content"][0]["text"] += part.text
        name = "reasoning_text" if isinstance(part, Reasoning) else "output_text"
        more: dict[str, Any] = {} if isinstance(part, Reasoning) else {"logprobs": []}
        events.append(self._event(f"response.{name}.delta", self._open, content_index=0, delta=part.text, **more))
        return events

    def end(self, completion: Completion, usage: Usage) -> list[bytes]:
        """Return the end of the last item, and the whole response."""
        closed = self._close()
        response = self._finished(completion, usage)
        return [*closed, self._event(f"response.{response['status']}", response=response)]

    def failed(self, error: HttpError, request_id: str) -> list[bytes]:
        """Return an error event, and the response that failed."""
        told = {"code": error.code or "server_error", "message": error.message}
        response = {**self._response("failed"), "error": told}
        return [self._event("error", **told, param=error.param), self._event("response.failed", response=response)]

    def whole(self, parts: list[Part], completion: Completion, usage: Usage) -> dict[str, Any]:
        """Return the response."""
        for part in joined(parts):
            self._items.append(self._item(part))
        return self._finished(completion, usage)

    def _finished(self, completion: Completion, usage: Usage) -> dict[str, Any]:
        cut = completion.finish_reason == "length"
        response = self._response("incomplete" if cut else "completed")
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        return response

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._model,
            "output": list(self._items),
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "truncation": "disabled",
            "usage": None,
            **self._repeated,
        }

    def _item(self, part: Part) -> dict[str, Any]:
        id = f"{self._id.removeprefix('resp_')}_{len(self._items) + (self._open is not None)}"
        if isinstance(part, ToolCall):
            call = {"call_id": f"call_{id}", "name": part.name, "arguments": part.arguments}
            return {"id": f"fc_{id}", "type": "function_call", "status": "completed", **call}
        if isinstance(part, Reasoning):
            content = [{"type": "reasoning_text", "text": part.text}]
            return {"id": f"rs_{id}", "type": "reasoning", "status": "completed", "summary": [], "content": content}
        text = {"type": "output_text", "text": part.text, "annotations": [], "logprobs": []}
        return {"id": f"msg_{id}", "type": "message", "status": "completed", "role": "assistant", "content": [text]}

    def _close(self) -> list[bytes]:
        """End the item under way, and keep it."""
        item, self._open = self._open, None
        if item is None:
            return []
        events = []
        if item["type"] == "function_call":
            told = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self._event("response.function_call_arguments.done", item, **told))
        else:
            (part,) = item["content"]
            more: dict[str, Any] = {"logprobs": []} if part["type"] == "output_text" else {}
            events.append(
                self._event(f"response.{part['type']}.done", item, content_index=0, text=part["text"], **more)
            )
            events.append(self._event("response.content_part.done", item, content_index=0, part=part))
        done = self._event("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        return [*events, done]

    def _added(self, item: dict[str, Any]) -> bytes:
        return self._event("response.output_item.added", output_index=len(self._items), item=item)

    def _event(self, name: str, of: dict[str, Any] | None = None, /, **content: Any) -> bytes:
        """Return an event; `of` is the item that it tells of."""
        self._number += 1
        place = {} if of is None else {"item_id": of["id"], "output_index": len(self._items)}
        body = {"type": name, "sequence_number": self._number, **place, **content}
        return f"event: {name}\ndata: {dump(body)}\n\n".encode()
