"""A hub on sockets of this machine: its API, its files, another host that it redirects to, and all that can go wrong.

python -m helpers.hub_server FOLDER     # serves a folder as org/model, prints its URL; ends with standard input
"""

import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ID = "org/model"
COMMIT = "c0ffee" + "0" * 34


@dataclass
class Request:
    """What a client asked for and what it got."""

    host: str  # "api", "hub" or "other": the host that holds large files
    name: str  # of the file, or the path of the API
    headers: dict
    begin: int = 0
    end: int = 0
    sent: int = 0  # bytes of the file
    status: int = 0


@dataclass
class Fault:
    """What a request gets instead of what it asked for.

    Args:
        status: with these headers, and no body.
        headers: of the answer, in place of the right ones.
        drop_after: bytes of the body, after which the connection is cut.
        content: another file is served.
        ignore_range: the whole file is sent.
    """

    status: int = 0
    headers: dict = field(default_factory=dict)
    drop_after: int | None = None
    content: bytes | None = None
    ignore_range: bool = False


class Hub:
    """A hub with one repository.

    Args:
        files: {name: bytes, or the path of a file}.
        small: the largest file that the hub serves itself; larger ones are stored with LFS on the other host.
    """

    def __init__(self, files: dict, small: int = 4096) -> None:
        self.files, self.small = files, small
        self.commits = {"main": COMMIT, COMMIT: COMMIT}
        self.requests: list[Request] = []
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.latency_s = 0.0
        self.total_sent = 0
        self.on_sent: Callable[[int], None] = lambda total: None  # called with the bytes of files sent so far
        self.listed: dict[str, dict] = {}  # entries of the list that are lies
        self.lock = threading.Condition()
        self.busy = self.most_at_once = 0  # answers with bytes of files that are on their way
        self._digests: dict = {}
        self._servers = [_server(self, "hub"), _server(self, "other")]
        self.url, self.other_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def size(self, name: str) -> int:
        """Return a file's size."""
        found = self.files[name]
        return len(found) if isinstance(found, bytes) else os.path.getsize(found)

    def sha256(self, name: str) -> str:
        """Return a file's sha256."""
        found = self.files[name]
        key = (name, found if isinstance(found, Path) else id(found))
        if key not in self._digests:
            self._digests[key] = hashlib.sha256(found if isinstance(found, bytes) else found.read_bytes()).hexdigest()
        return self._digests[key]

    def git_id(self, name: str) -> str:
        """Return the name that git gives a small file's content."""
        content = self.files[name]
        content = content if isinstance(content, bytes) else content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def listing(self, revision: str) -> dict:
        """Return what the API says of the repository."""
        siblings = []
        for name in self.files:
            entry = {"rfilename": name, "size": self.size(name)}
            if self.size(name) > self.small:
                entry["lfs"] = {"sha256": self.sha256(name), "size": self.size(name), "pointerSize": 130}
                entry["blobId"] = "0" * 40
            else:
                entry["blobId"] = self.git_id(name)
            siblings.append({**entry, **self.listed.get(name, {})})
        return {"id": ID, "modelId": ID, "sha": self.commits[revision], "siblings": siblings, "tags": []}

    def sent(self, name: str | None = None) -> int:
        """Return how many bytes of a file, or of all, were sent."""
        with self.lock:
            assert self.lock.wait_for(lambda: not self.busy, 60)
            return sum(request.sent for request in self.requests if name in (None, request.name))

    def close(self) -> None:
        """Stop serving."""
        for server in self._servers:
            server.shutdown()
            server.server_close()


@contextmanager
def hub(files: dict, **options):
    """Serve files as a repository of a hub."""
    served = Hub(files, **options)
    try:
        yield served
    finally:
        served.close()


def lead_to(served: Hub, monkeypatch, cache: Path) -> None:
    """Let huggingface_hub and moeflow ask a hub, in this process, with a cache of its own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    template = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address) -> None:
        """A client that left is no error."""


def _server(owner: Hub, host: str) -> _Server:
    class Handler(_Handler):
        hub, host_name = owner, host

    server = _Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


def _tree(listing: dict) -> list[dict]:
    """Return the listing as the API for a tree gives it."""
    found = []
    for one in listing["siblings"]:
        entry = {"type": "file", "path": one["rfilename"], "size": one["size"], "oid": one["blobId"]}
        if "lfs" in one:
            entry["lfs"] = {"oid": one["lfs"]["sha256"], "size": one["size"], "pointerSize": 130}
        found.append(entry)
    return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    hub: Hub
    host_name: str

    def log_message(self, format, *args) -> None:
        """Tell nothing."""

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer."""
        path = unquote(urlsplit(self.path).path)
        is_api = path.startswith("/api/models/")
        name = path if is_api else path.removeprefix(f"/{ID}/resolve/").partition("/")[2]
        if self.host_name == "other":
            name = path.removeprefix("/files/")
        headers = {key.lower(): value for key, value in self.headers.items()}
        request = Request("api" if is_api else self.host_name, name, headers)
        with self.hub.lock:
            self.hub.requests.append(request)
        if self.hub.latency_s:
            time.sleep(self.hub.latency_s)
        fault = self.hub.fault(request)
        if fault is not None and fault.status:
            return self._plain(request, fault.status, b"", fault.headers)
        if is_api:
            return self._api(request, path)
        if name not in self.hub.files:
            return self._plain(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.host_name == "hub" and self.hub.size(name) > self.hub.small:
            linked = {"X-Linked-ETag": f'"{self.hub.sha256(name)}"', "X-Linked-Size": str(self.hub.size(name))}
            linked["X-Repo-Commit"] = COMMIT
            return self._plain(request, 302, b"", {"Location": f"{self.hub.other_url}/files/{name}?signed=1", **linked})
        return self._file(request, fault or Fault())

    def _api(self, request: Request, path: str) -> None:
        found = re.fullmatch(r"/api/models/(.+?)(?:/(?:revision|tree)/(.+))?", path)
        if found[1] != ID:
            return self._plain(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        if (found[2] or "main") not in self.hub.commits:
            return self._plain(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        listing = self.hub.listing(found[2] or "main")
        body = json.dumps(_tree(listing) if "/tree/" in path else listing).encode()
        return self._plain(request, 200, body, {"Content-Type": "application/json"})

    def _plain(self, request: Request, status: int, body: bytes, headers: dict) -> None:
        request.status = status
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def _file(self, request: Request, fault: Fault) -> None:
        content = self.hub.files[request.name] if fault.content is None else fault.content
        size = len(content) if isinstance(content, bytes) else os.path.getsize(content)
        etag = hashlib.md5(content).hexdigest() if isinstance(content, bytes) else f"{size:x}"
        if self.host_name == "hub" and fault.content is None:
            etag = self.hub.git_id(request.name)
        begin, end, status = 0, size, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        same = request.headers.get("if-range", f'"{etag}"') == f'"{etag}"'
        if asked and same and not fault.ignore_range:
            begin, end, status = int(asked[1]), min(size, int(asked[2]) + 1), 206
        if begin > size:
            return self._plain(request, 416, b"", {"Content-Range": f"bytes */{size}"})
        request.begin, request.end, request.status = begin, end, status
        headers = {
            "Content-Length": str(end - begin),
            "ETag": f'"{etag}"',
            "Accept-Ranges": "bytes",
            "X-Repo-Commit": COMMIT,
        }
        if status == 206:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        self.send_response(status)
        for key, value in {**headers, **fault.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.flush()
        last = end if fault.drop_after is None else min(end, begin + fault.drop_after)
        if self.command == "HEAD":
            return
        with self._busy():
            self._send(request, content, begin, last)
        if last < end:
            self.close_connection = True

    @contextmanager
    def _busy(self):
        with self.hub.lock:
            self.hub.busy += 1
            self.hub.most_at_once = max(self.hub.most_at_once, self.hub.busy)
        try:
            yield
        finally:
            with self.hub.lock:
                self.hub.busy -= 1
                self.hub.lock.notify_all()

    def _count(self, request: Request, num_bytes: int) -> None:
        with self.hub.lock:
            request.sent += num_bytes
            self.hub.total_sent += num_bytes
            total = self.hub.total_sent
        self.hub.on_sent(total)

    def _send(self, request: Request, content, begin: int, end: int) -> None:
        if isinstance(content, bytes):
            view = memoryview(content)
            while begin < end:
                count = self.connection.send(view[begin : min(end, begin + (1 << 20))])
                begin += count
                self._count(request, count)
            return
        with open(content, "rb") as file:
            while begin < end:
                count = os.sendfile(self.connection.fileno(), file.fileno(), begin, end - begin)
                begin += count
                self._count(request, count)


def main() -> None:
    """Serve a folder until standard input ends."""
    folder = Path(sys.argv[1])
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    served = Hub(files)
    print(served.url, flush=True)
    sys.stdin.read()
    served.close()


if __name__ == "__main__":
    main()
