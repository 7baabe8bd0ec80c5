"""The body of a request: read within a limit and a time, and parsed as one JSON object.

Knows ASGI's messages. Knows nothing of fields.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

from moeflow.batch.messages import parse_object
from moeflow.errors import ConfigError
from moeflow.server.wire.errors import HttpError

if TYPE_CHECKING:
    from starlette.types import Receive

_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_CLOSE = {"connection": "close"}  # what is left of the body is not read
_PARSED_AT_ONCE = 1 << 16  # bytes; longer ones are parsed in a thread


class Disconnected(Exception):
    """The client left before its body was whole."""


async def read_body(receive: Receive, max_bytes: int, timeout_s: float) -> bytes:
    """Return a body.

    Raises:
        HttpError: 413, it is longer than max_bytes; 408, it did not come in time.
        Disconnected: the client left.
    """

    async def read() -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            part = message.get("body", b"")
            size += len(part)
            if size > max_bytes:
                told = f"the body is longer than {max_bytes:,} bytes. Send less."
                raise HttpError(413, told, code="body_too_long", headers=_CLOSE)
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), timeout_s)
    except asyncio.TimeoutError:
        raise HttpError(
            408,
            f"the body did not come within {timeout_s:g} seconds. Send it faster.",
            code="body_too_slow",
            headers=_CLOSE,
        ) from None


async def parse_body(body: bytes, max_depth: int) -> dict[str, Any]:
    """Return the object that a body holds.

    Raises:
        HttpError: 400, it is no JSON object, not UTF-8, nested deeper than max_depth, or has a field twice.
    """
    if len(body) > _PARSED_AT_ONCE:
        return await asyncio.to_thread(_parse, body, max_depth)
    return _parse(body, max_depth)


def _parse(body: bytes, max_depth: int) -> dict[str, Any]:
    if _depth(body) > max_depth:
        raise HttpError(400, f"the body is nested deeper than {max_depth} levels. Make it flatter.")
    try:
        return parse_object(body)
    except ConfigError as error:
        raise HttpError(400, f"the body cannot be read: {error}.") from None


def _depth(body: bytes) -> int:
    """Count the levels of objects and lists, or some number that is no less where there are few."""
    brackets = body.count(b"[") + body.count(b"{")
    if brackets <= 16:
        return brackets
    depth = deepest = 0
    for match in _BRACKETS.finditer(body):
        found = match[0]
        depth += (found in b"[{") - (found in b"]}")
        deepest = max(deepest, depth)
    return deepest
