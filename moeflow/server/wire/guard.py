"""The guard before the application: who may call, from which page, with how much, and under which request id.

Pure ASGI. Knows headers and bodies. Knows nothing of endpoints beyond the paths that are open to all.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import time
import traceback
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response

from moeflow.server.settings import ServerSettings
from moeflow.server.wire.body import Disconnected, read_body
from moeflow.server.wire.errors import HttpError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = ("/", "/health")  # without a key, and before the model is there
_POLLED = ("/health", "/stats", "/metrics")  # asked for again and again, so not logged
_READ_ANYWAY = 1 << 16  # bytes of a body that is not looked at; a longer one ends the connection
_logger = logging.getLogger("moeflow.server")


class Guard:
    """Lets through what may be answered; its body is read whole by then.

    Args:
        app: what answers.
        settings: the server's.
        unavailable: returns why nothing can be answered now; None where it can.
        respond: returns an error in the form that a path's clients read, from the error, the path and the request's id.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        unavailable: Callable[[], HttpError | None],
        respond: Callable[[HttpError, str, str], Response],
    ) -> None:
        self._app = app
        self._settings = settings
        self._unavailable = unavailable
        self._respond = respond
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # there are no websockets
        id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = id
        begin_s, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = id  # OpenAI's name, and Anthropic's
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            body = await self._admit(scope, receive)
            if body and self._settings.log_prompts:
                _logger.info("%s body %s", id, body.decode(errors="backslashreplace"))
            await self._app(scope, _replay(body, receive), send_with_id)
        except HttpError as error:
            await self._respond(error, scope["path"], id)(scope, receive, send_with_id)
        except Disconnected:
            status = 499
        except Exception as error:
            _logger.error("%s failed: %s", id, _where(error))
            if not status:  # else the response has begun, and the server under us closes the connection
                failure = HttpError(500, "the server failed at this request; its log says where.")
                await self._respond(failure, scope["path"], id)(scope, receive, send_with_id)
        finally:
            took_ms = 1000 * (time.perf_counter() - begin_s)
            level = logging.DEBUG if scope["path"] in _POLLED and status < 400 else logging.INFO
            _logger.log(level, "%s %s %s %d %.0f ms", id, scope["method"], _printable(scope["path"]), status, took_ms)

    async def _admit(self, scope: Scope, receive: Receive) -> bytes:
        """Return the body of a request that may be answered."""
        timeout_s = self._settings.body_timeout_s
        try:
            self._check(scope["path"], Headers(scope=scope))
        except HttpError as error:
            # A client reads no answer while it sends; and what is left on a connection would be taken for a request.
            try:
                await read_body(receive, _READ_ANYWAY, timeout_s)
            except HttpError:
                error.headers["connection"] = "close"
            raise
        return await read_body(receive, self._settings.max_body_bytes, timeout_s)

    def _check(self, path: str, headers: Headers) -> None:
        self._check_host(headers)
        self._check_origin(headers)
        if path not in OPEN_PATHS:
            self._check_key(headers)
            unavailable = self._unavailable()
            if unavailable is not None:
                raise unavailable

    def _check_host(self, headers: Headers) -> None:
        """Refuse a name that is not ours: a page of another site may have had it point to this machine."""
        given = headers.get("host", "")
        name = _host_name(given)
        ours = ("localhost", self._settings.host.lower(), *(host.lower() for host in self._settings.allowed_hosts))
        if name in ours or _is_address(name):
            return
        raise HttpError(
            403,
            f"this server does not answer to the host {given[:100]!r}. Use its address or localhost, or start it with "
            "--allowed-host.",
            code="host_not_allowed",
        )

    def _check_origin(self, headers: Headers) -> None:
        """Refuse pages of other sites, whose requests a browser sends even where it hides the answers."""
        origin = headers.get("origin")
        if origin is None or "*" in self._settings.cors_origins or origin in self._settings.cors_origins:
            return
        if origin != "null" and urlsplit(origin).netloc.lower() == headers.get("host", "").lower():
            return
        raise HttpError(
            403,
            f"pages of {origin[:100]!r} may not call this server. Start it with --cors-origin to let them.",
            code="origin_not_allowed",
        )

    def _check_key(self, headers: Headers) -> None:
        if self._key is None:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = (token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", ""))
        right = [hmac.compare_digest(key.encode(), self._key) for key in given]  # all, so that the time tells nothing
        if not any(right):
            raise HttpError(
                401,
                "the API key is missing or wrong. Send it as Authorization: Bearer KEY, or as x-api-key: KEY.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a receive that gives the whole body first."""
    left = [body]

    async def received() -> Any:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return received


def _host_name(host: str) -> str:
    """Return the name of a `Host` header without its port, in small letters."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _printable(path: str) -> str:
    return path[:200].encode("unicode_escape").decode()


def _where(error: Exception) -> str:
    """Return an error's type and the lines it came through; its words may hold a prompt's."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at " + " < ".join(f"{one.filename}:{one.lineno}" for one in reversed(frames))
