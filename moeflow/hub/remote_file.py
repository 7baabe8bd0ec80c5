"""One file at its server: ranges of its bytes, read again where a connection breaks, and whether it stays the same.

Knows Range, If-Range and Content-Range. Knows nothing of where the bytes go.
"""

import re
import threading
from collections.abc import Callable, Iterator

from moeflow.errors import ModelSourceError
from moeflow.hub.client import Answer, HubClient
from moeflow.hub.patience import Patience
from moeflow.hub.refusals import LostError, is_passing, lost, refusal

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)$")


class ChangedError(Exception):
    """The file at the server is not, or no longer, the one that the repository lists."""


class IgnoresRangeError(Exception):
    """The server sends the whole file whatever range is asked for."""


class StoppedError(Exception):
    """The reader was told to stop."""


class RemoteFile:
    """A file at the hub. Many threads may read it.

    Args:
        client: of the hub.
        url: of the file at the hub, with its commit.
        what: names it in errors.
        size: in bytes, as the repository lists it.
        sha256: where the repository lists it.
        patience_s: how long nothing may come.
        stop: ends reads.
    """

    def __init__(
        self,
        client: HubClient,
        url: str,
        what: str,
        size: int,
        sha256: str | None,
        patience_s: float,
        stop: threading.Event,
    ) -> None:
        self._client, self._url, self._what, self._size, self._sha256 = client, url, what, size, sha256
        self._patience_s, self._stop = patience_s, stop
        self._lock = threading.Lock()
        self._location: str | None = None  # where the hub sent to: asked first from then on
        self._validator: str | None = None  # the ETag there

    def read(self, begin: int, end: int, take: Callable[[int, bytes], None], *, whole: bool = False) -> None:
        """Read bytes, in order; from where a connection broke the next goes on.

        Args:
            begin: the first byte.
            end: behind the last.
            take: called with (offset, bytes) as they come.
            whole: a body of the whole file is read through up to the bytes wanted.

        Raises:
            ChangedError: the file is another one.
            IgnoresRangeError: ranges are ignored, and not `whole`.
            StoppedError: `stop` was set.
            ModelSourceError: it is refused, or nothing has come for too long.
        """
        patience = Patience(self._what, self._patience_s, self._stop)
        while begin < end:
            if self._stop.is_set():
                raise StoppedError
            try:
                for data in self._body(begin, end, whole):
                    if self._stop.is_set():
                        raise StoppedError
                    take(begin, data)
                    begin += len(data)
                    patience.came()
                if begin < end:
                    raise LostError(f"the connection ended {end - begin:,} bytes early")
            except LostError as error:
                if self._stop.is_set():
                    raise StoppedError from error
                patience.wait(error)

    def forget(self) -> None:
        """Ask the hub anew where the file is, and take the ETag there for the right one."""
        with self._lock:
            self._location = self._validator = None

    def _body(self, begin: int, end: int, whole: bool) -> Iterator[bytes]:
        with self._lock:
            location, validator = self._location, self._validator
        headers = {"Range": f"bytes={begin}-{end - 1}"}
        if validator is not None:
            headers["If-Range"] = validator
        with self._client.get(location or self._url, headers) as answer:
            if answer.status not in (200, 206):
                if location is not None and 400 <= answer.status < 500 and not is_passing(answer.status):
                    self.forget()  # an address that was signed for an hour
                    raise LostError(f"the address that the hub gave is refused by now ({answer.status})", 0)
                raise self._refused(answer)
            self._check_same(answer, validator)
            skip = self._place(answer, begin, end, whole)
            with self._lock:
                if self._location is None and answer.url != self._url:
                    self._location = answer.url
                if self._validator is None and answer.url == (self._location or self._url):
                    self._validator = _strong(answer.headers.get("ETag"))
            for data in answer.chunks(skip + end - begin):
                if skip >= len(data):
                    skip -= len(data)
                else:
                    yield data[skip:]
                    skip = 0

    def _refused(self, answer: Answer) -> Exception:
        if is_passing(answer.status):
            return lost(answer.status, answer.headers)
        if answer.status == 416:
            return ChangedError(f"the server has no such bytes of {self._what}: it is shorter there")
        return refusal(answer.status, answer.headers, self._what, self._client.endpoint)

    def _check_same(self, answer: Answer, validator: str | None) -> None:
        linked = answer.linked.get("x-linked-etag", "").strip('W/"')
        if self._sha256 and len(linked) == 64 and linked != self._sha256:
            raise ChangedError(f"{self._what} has another sha256 at the server now")
        if validator is not None and answer.headers.get("ETag") not in (None, validator):
            raise ChangedError(f"{self._what} has another ETag at the server now")

    def _place(self, answer: Answer, begin: int, end: int, whole: bool) -> int:
        """Return how many bytes of the body come before those that were asked for."""
        if answer.status == 206:
            found = _RANGE.match(answer.headers.get("Content-Range", ""))
            if not found or int(found[1]) != begin or not begin <= int(found[2]) < end:
                raise ModelSourceError(
                    f"{self._what}: asked for bytes {begin} to {end - 1}, the server sends "
                    f"{answer.headers.get('Content-Range', 'some others')!r:.80}. Set HF_ENDPOINT to another mirror, "
                    "or fetch without a proxy."
                )
            total = found[3]
        else:
            total = answer.headers.get("Content-Length", "*")
        if total.isdecimal() and int(total) != self._size:
            raise ChangedError(f"{self._what} has {int(total):,} bytes at the server, {self._size:,} in the list")
        if answer.status == 206:
            return 0
        if not whole and (begin, end) != (0, self._size):
            raise IgnoresRangeError
        return begin


def _strong(etag: str | None) -> str | None:
    return etag if etag and etag.startswith('"') else None
