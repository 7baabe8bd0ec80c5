"""Reads an answer as it comes: text, reasoning and tool calls apart.

Knows marks and transformers' response parser. Knows nothing of tokens.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from moeflow.hf.encoding import response_parser
from moeflow.server.reading.marks import Marks

_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError)  # of the parser, for what a model may write
_REASONING = ("reasoning_content", "thinking", "reasoning")  # how templates call it


class Text(NamedTuple):
    """A piece of the answer's text."""

    text: str


class Reasoning(NamedTuple):
    """A piece of what the model thinks before it answers."""

    text: str


class ToolCall(NamedTuple):
    """A call of a tool, whole.

    Args:
        name: of the function.
        arguments: a JSON object, as text.
    """

    name: str
    arguments: str


Part = Text | Reasoning | ToolCall


class AnswerReader:
    """Reads one answer.

    What cannot be read as its marks ask (a call that is no JSON, a tool that the request has not) is text.

    Args:
        marks: of the model.
        prompt: the end of the prompt's text, which may begin the answer.
        tools: of the request, in OpenAI's form; calls of others are text.
        most_calls: those beyond it are left out; None for all.
    """

    def __init__(
        self,
        marks: Marks,
        prompt: str = "",
        tools: list[dict[str, Any]] | None = None,
        *,
        most_calls: int | None = None,
    ) -> None:
        self._parser: Any = None
        self._calls_left = most_calls
        self._names = {tool["function"]["name"] for tool in tools or []}
        self._raw = ""  # what came behind the last piece that is out, marks included
        self._begun: str | None = None  # the kind of the piece before, for white space between kinds
        if marks.template is not None:
            begun = next((mark for mark in marks.prefilled if prompt.rstrip().endswith(mark)), "")
            self._parser = response_parser(marks.template, begun, tools or [])

    def push(self, text: str) -> list[Part]:
        """Take the next piece of the answer and return what is certain now."""
        if self._parser is None:
            return [Text(text)] if text else []
        self._raw += text
        try:
            return self._parts(self._parser.feed(text))
        except _UNREADABLE:
            return self._give_up()

    def finish(self) -> list[Part]:
        """Return the rest."""
        if self._parser is None:
            return []
        try:
            _, events = self._parser.finalize()
            return self._parts(events)
        except _UNREADABLE:
            return self._give_up()

    def _give_up(self) -> list[Part]:
        """Read what could not be read, and all that comes, as text."""
        self._parser = None
        return self._text(Text, self._raw)

    def _parts(self, events: list[dict[str, Any]]) -> list[Part]:
        parts: list[Part] = []
        for event in events:
            kind, field = event["type"], event.get("field")
            if kind == "region_chunk" and not event["dirty"]:
                self._raw = self._raw.partition(event["text"])[2]
                if field == "content" or field in _REASONING:
                    parts += self._text(Text if field == "content" else Reasoning, event["text"])
            elif kind == "region_close" and field == "tool_calls":
                parts += self._calls(event["value"])
                self._raw = ""
        return parts

    def _text(self, kind: type[Text] | type[Reasoning], text: str) -> list[Part]:
        """Return a piece of text, without the white space that stands between two kinds."""
        if self._begun != kind.__name__:
            text = text.lstrip()
        if not text:
            return []
        self._begun = kind.__name__
        return [kind(text)]

    def _calls(self, value: Any) -> list[Part]:
        calls: list[Part] = []
        for call in value if isinstance(value, list) else [value]:
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict):
                return self._text(Text, self._raw)
            name = function.get("name")
            if not isinstance(name, str) or (self._names and name not in self._names):
                return self._text(Text, self._raw)
            arguments = function.get("arguments", function.get("parameters", {}))
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            calls.append(ToolCall(name, arguments))
        self._begun = None
        if self._calls_left is not None:
            calls = calls[: self._calls_left]
            self._calls_left -= len(calls)
        return calls
