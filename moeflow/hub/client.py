"""GET requests to the hub and to the hosts that it sends to; the token goes to the hub alone.

Knows URLs, proxies and connections. Knows nothing of files.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.util import Timeout, make_headers

from moeflow.errors import ModelSourceError
from moeflow.formatting import brief
from moeflow.hub.refusals import LostError

CONNECTIONS = 4  # at once
_TIMEOUT = Timeout(connect=10, read=30)  # seconds without a byte: the connection is lost then
_MOST_REDIRECTS = 10
_CHUNK_BYTES = 256 << 10
_Broken = (urllib3.exceptions.HTTPError, OSError)


class HubClient:
    """Connections to a hub.

    Args:
        endpoint: URL of the hub.
        token: sent to the endpoint's own host, port and scheme only; None for none.
        agent: says who asks.
    """

    def __init__(self, endpoint: str, token: str | None, agent: str) -> None:
        self.endpoint = endpoint
        self._token, self._agent = token, agent
        self._lock = threading.Lock()
        self._managers: dict[str | None, urllib3.PoolManager] = {}
        self._open: set[urllib3.BaseHTTPResponse] = set()

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str]) -> "Iterator[Answer]":
        """Ask for a URL, and for those that it redirects to.

        Args:
            url: of the endpoint, or of where it redirected to.
            headers: sent to each host.

        Yields:
            The answer; its connection is used again where all of it was read.

        Raises:
            LostError: no connection, or it broke.
            ModelSourceError: redirects without end, or to what is not HTTP.
        """
        linked: dict[str, str] = {}
        for _ in range(_MOST_REDIRECTS):
            response = self._request(url, headers)
            try:
                location = response.headers.get("Location")
                if response.status not in (301, 302, 303, 307, 308) or not location:
                    yield Answer(response, url, linked)
                    return
                named = {name.lower(): value for name, value in response.headers.items()}
                linked.update({name: value for name, value in named.items() if name.startswith("x-linked-")})
                url = urljoin(url, location)
                with suppress(*_Broken):
                    response.drain_conn()
            finally:
                with self._lock:
                    self._open.discard(response)
                if response.length_remaining == 0:
                    response.release_conn()
                else:
                    response.close()
        raise ModelSourceError(f"{self.endpoint} redirects without end. Check HF_ENDPOINT.")

    def abort(self) -> None:
        """End the reads that are going on, from another thread."""
        with self._lock:
            for response in self._open:
                with suppress(Exception):
                    response.shutdown()

    def close(self) -> None:
        """Close the connections that are kept."""
        for manager in self._managers.values():
            manager.clear()

    def _request(self, url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ModelSourceError(f"{self.endpoint} leads to {brief(url)!r}, which is not HTTP. Check HF_ENDPOINT.")
        sent = {"User-Agent": self._agent, "Accept-Encoding": "identity", **headers}
        if self._token is not None and _origin(url) == _origin(self.endpoint):
            sent["Authorization"] = f"Bearer {self._token}"
        try:
            response = self._manager(parts.scheme, parts.hostname).request(
                "GET", url, headers=sent, preload_content=False, redirect=False, retries=False, timeout=_TIMEOUT
            )
        except _Broken as error:
            raise _broken(error, parts.hostname) from error
        with self._lock:
            self._open.add(response)
        return response

    def _manager(self, scheme: str, host: str) -> urllib3.PoolManager:
        """Return the pool of connections to a host: direct, or through the proxy that the environment names."""
        found = getproxies()
        proxy = None if proxy_bypass(host) else found.get(scheme) or found.get("all")
        with self._lock:
            if proxy not in self._managers:
                self._managers[proxy] = _pool(proxy)
            return self._managers[proxy]


class Answer:
    """A response and where it came from.

    Args:
        response: its body unread.
        url: that it came from in the end.
        linked: what the hub said of the file on the way there: x-linked-etag, x-linked-size.
    """

    def __init__(self, response: urllib3.BaseHTTPResponse, url: str, linked: dict[str, str]) -> None:
        self.status, self.headers, self.url, self.linked = response.status, response.headers, url, linked
        self._response = response

    def chunks(self, num_bytes: int) -> Iterator[bytes]:
        """Yield the body's first bytes as they come.

        Args:
            num_bytes: as many, no more; fewer where the server ends the body before.

        Raises:
            LostError: the connection broke.
        """
        while num_bytes:
            try:
                data = self._response.read(min(num_bytes, _CHUNK_BYTES), decode_content=False)
            except _Broken as error:
                raise _broken(error, urlsplit(self.url).hostname or "") from error
            if not data:
                return
            num_bytes -= len(data)
            yield data


def _pool(proxy: str | None) -> urllib3.PoolManager:
    if proxy is None:
        return urllib3.PoolManager(maxsize=2 * CONNECTIONS)
    auth = urlsplit(proxy)
    user = f"{auth.username}:{auth.password or ''}" if auth.username else None
    return urllib3.ProxyManager(
        proxy, maxsize=2 * CONNECTIONS, proxy_headers=make_headers(proxy_basic_auth=user) if user else None
    )


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _broken(error: BaseException, host: str) -> LostError:
    reason = " ".join(f"{type(error).__name__}: {error.args[0] if error.args else ''}".split())
    return LostError(f"the connection to {host} failed ({brief(reason)})")
