"""Responses that end when the client leaves: server-sent events, and work for one whole answer.

Knows ASGI's messages. Knows nothing of what the events say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import Response

from moeflow.server.wire.body import Disconnected
from moeflow.server.wire.errors import dump

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

_Result = TypeVar("_Result")
DONE = b"data: [DONE]\n\n"
PING = b": alive\n\n"  # a comment, which clients skip


def event(content: Any) -> bytes:
    """Return one event whose data is JSON."""
    return f"data: {dump(content)}\n\n".encode()


class EventStream(Response):
    """Sends events as they come.

    Args:
        events: each whole, as `event` writes it.
        close: called when the stream is over: at its end, when the client has left, or when it was cancelled.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client has left."""
        try:
            await while_connected(receive, self._send(send))
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Return the result of work, which is cancelled when the client leaves.

    Raises:
        Disconnected: the client left first.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Disconnected
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
