"""The HTTP server: uvicorn in a thread of its own, on a port that is bound before anything is loaded.

Knows sockets and uvicorn. Knows nothing of what is answered.
"""

from __future__ import annotations

import errno
import socket
import threading
from typing import TYPE_CHECKING

from moeflow.errors import ConfigError, MoeflowError
from moeflow.server.settings import ServerSettings
from moeflow.server.wire.listener import Listener

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_QUEUE = 512  # connections that wait to be accepted
_ACCEPTED_AT_ONCE = 64  # before those that are too many are closed
_LAST_WORDS_S = 5  # in which responses under way may end once the server stops


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to a port; port 0 takes a free one.

    Raises:
        ConfigError: another program has the port, or the host is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = Listener(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(_QUEUE)
        except BaseException:
            bound.close()
            raise
        return bound
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            told = f"port {port} of {host} is in use by another program. Give another --port, or 0 for a free one."
        else:
            told = f"port {port} of {host} cannot be bound: {error.strerror}. Give another --host or --port."
        raise ConfigError(told) from None


class HttpServer:
    """Answers on a bound socket while the `with` block runs.

    Args:
        app: what answers; its shutdown is called at the end.
        bound: of `bind`; closed at the end.
        settings: limits of connections.

    Attributes:
        url: where it answers.
    """

    def __init__(self, app: ASGIApp, bound: socket.socket, settings: ServerSettings) -> None:
        import uvicorn

        from moeflow.server.wire.connections import limited_protocol

        host, port = bound.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        config = uvicorn.Config(
            app,
            http=limited_protocol(settings),
            ws="none",
            loop="asyncio",
            lifespan="on",
            access_log=False,
            log_config=None,
            log_level="error",
            server_header=False,
            proxy_headers=False,
            backlog=_ACCEPTED_AT_ONCE,  # asyncio takes it for both
            timeout_graceful_shutdown=_LAST_WORDS_S,
        )
        self._server = uvicorn.Server(config)
        self._bound = bound
        self._thread = threading.Thread(target=self._serve, name="moeflow-http", daemon=True)
        self._ended = threading.Event()

    def __enter__(self) -> HttpServer:
        self._thread.start()
        while not self._server.started:
            if self._ended.wait(0.005):
                raise MoeflowError("the HTTP server could not be started; its log says why.")
        self._bound.listen(_QUEUE)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _serve(self) -> None:
        try:
            self._server.run(sockets=[self._bound])
        finally:
            self._ended.set()
            self._bound.close()
