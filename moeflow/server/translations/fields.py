"""Fields of a foreign body, checked as they are translated.

Knows JSON objects. Knows nothing of what they ask.
"""

from __future__ import annotations

from typing import Any

from moeflow.batch.messages import refuse_unknown, short
from moeflow.errors import ConfigError


def object_of(value: Any, what: str, allowed: tuple[str, ...]) -> dict[str, Any]:
    """Return an object that has none but these fields.

    Raises:
        ConfigError: it is none, or has others.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{what} is {short(value)}; it must be an object")
    refuse_unknown(value, allowed, what)
    return value


def text_of(value: Any, what: str) -> str:
    """Return a text.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(value, str):
        raise ConfigError(f"{what} is {short(value)}; it must be a text")
    return value


def list_of(value: Any, what: str) -> list[Any]:
    """Return a list.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(value, list):
        raise ConfigError(f"{what} is {short(value)}; it must be a list")
    return value


def given(body: dict[str, Any], **names: str) -> dict[str, Any]:
    """Return the fields that a body has, under other names.

    Args:
        body: the foreign one.
        **names: of chat completions, each with its foreign name.
    """
    return {own: body[foreign] for own, foreign in names.items() if body.get(foreign) is not None}
