"""Reads an answer that a grammar has bound to a list of calls.

Knows JSON. Knows nothing of families of models.
"""

from __future__ import annotations

import json

from moeflow.server.reading.answer_reader import Part, Text, ToolCall


class ForcedCallsReader:
    """Reads one answer, whose calls are certain at its end; one that was cut off stays text."""

    def __init__(self) -> None:
        self._text = ""

    def push(self, text: str) -> list[Part]:
        """Take the next piece of the answer."""
        self._text += text
        return []

    def finish(self) -> list[Part]:
        """Return the calls."""
        try:
            calls = json.loads(self._text)
        except ValueError:
            return [Text(self._text)] if self._text else []
        return [ToolCall(call["name"], json.dumps(call["arguments"], ensure_ascii=False)) for call in calls]
