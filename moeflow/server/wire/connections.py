"""Connections with limits: their number, the time headers may take, and the time that a client may take nothing.

Knows uvicorn's HTTP protocol. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from moeflow.server.settings import ServerSettings
from moeflow.server.wire.listener import TOO_MANY

_LEAVING_S = 1.0  # in which a client that is turned away may send the rest of its request
_MOST_LEAVING = 64  # clients that may do so at once; one more ends the one that came first


def limited_protocol(settings: ServerSettings) -> type[asyncio.Protocol]:
    """Return a class of connections with a server's limits, as uvicorn's `http` takes it.

    Connections take at most half of the files that the process may open: the model needs some as well.
    """
    most_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(settings.max_connections, max(1, most_files // 2))
    leaving: dict[asyncio.Protocol, asyncio.Transport] = {}  # in the order in which they were turned away

    class LimitedProtocol(H11Protocol):
        """One connection."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._until_headers: asyncio.TimerHandle | None = None
            self._until_read: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            if len(self.connections) >= most:
                self._turn_away(transport)
                return
            super().connection_made(transport)
            self._until_headers = self.loop.call_later(settings.header_timeout_s, transport.abort)

        def _turn_away(self, transport: asyncio.Transport) -> None:
            """Say why, and let the client end: one whose request is cut off may lose the answer."""
            transport.write(TOO_MANY)
            transport.write_eof()
            if len(leaving) >= _MOST_LEAVING:
                leaving.pop(next(iter(leaving))).abort()
            leaving[self] = transport
            self._until_headers = self.loop.call_later(_LEAVING_S, transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            _stop(self._until_headers)
            self._until_headers = None
            _stop(self._until_read)
            self._until_read = None
            leaving.pop(self, None)
            if self.transport is not None:
                super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport is None:  # it was turned away
                return
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:  # the headers are there
                _stop(self._until_headers)
                self._until_headers = None
            elif self._until_headers is None:  # the next request on this connection has begun
                self._until_headers = self.loop.call_later(settings.header_timeout_s, self.transport.abort)

        def pause_writing(self) -> None:
            """Called where the client takes nothing and what waits for it has become much."""
            super().pause_writing()
            if self._until_read is None:
                self._until_read = self.loop.call_later(settings.send_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            _stop(self._until_read)
            self._until_read = None

    return LimitedProtocol


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
