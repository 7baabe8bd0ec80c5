"""The forms in which one answer is written, part by part or whole.

Knows parts of an answer. Knows nothing of bodies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from moeflow.server.reading.answer_reader import Part, ToolCall
from moeflow.server.wire.errors import HttpError

if TYPE_CHECKING:
    from moeflow.engine.request import Completion
    from moeflow.server.endpoints.answering import Usage


class Form(Protocol):
    """Writes one answer."""

    def begin(self, usage: Usage) -> list[bytes]:
        """Return what is sent before the first part."""

    def part(self, part: Part) -> list[bytes]:
        """Return what a part adds."""

    def end(self, completion: Completion, usage: Usage) -> list[bytes]:
        """Return what is sent behind the last part."""

    def failed(self, error: HttpError, request_id: str) -> list[bytes]:
        """Return what is sent where the answer cannot go on."""

    def whole(self, parts: list[Part], completion: Completion, usage: Usage) -> dict[str, Any]:
        """Return the answer in one piece."""


def joined(parts: list[Part]) -> list[Part]:
    """Return parts of which neighbours of one kind are one, calls apart."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, ToolCall) or isinstance(last, ToolCall) or type(last) is not type(part):
            found.append(part)
        elif last is not None:
            found[-1] = type(part)(last.text + part.text)
    return found
