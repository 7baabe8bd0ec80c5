"""Soak: requests of all kinds on real sockets, answers that are checked, and what is left of them afterwards.

Clients leave, cancel and send what is no request; some answers are bound by schemas. Knows the server's own process:
its engine, threads and files. Knows nothing of command lines. tests/server/test_soak.py runs it small.
"""

import asyncio
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import psutil

from moeflow import Engine, SamplingParams
from moeflow.server import ServerSettings, create_app
from moeflow.server.wire.http_server import HttpServer, bind

TEXT = "/v1/completions"
KINDS = {"whole": 0.35, "stream": 0.3, "leaves": 0.15, "cancels": 0.1, "malformed": 0.1}  # of requests
BOUND_SHARE = 0.3  # of those that are no nonsense
AT_ONCE = 24
SETTLES_S = 60  # in which what has ended must be gone
PROMPTS = ("hello", "the river", "one two three", "a long way from home to the sea", "why")
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["lake", "sea"]}, "size": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["kind", "size"],
    "additionalProperties": False,
}


class Case(NamedTuple):
    """A request whose answer is known.

    Args:
        body: of the request.
        text: of its answer, computed alone.
        reason: why the answer ends.
    """

    body: dict
    text: str
    reason: str


def soak(
    model: Any, tokenizer: Any, count: int, *, seed: int = 0, kv_memory: int = 1 << 20, max_batch_size: int = 8
) -> dict:
    """Send requests, and return what came of them and what is left: an empty "wrong" and "left" is as it should be.

    Args:
        model: in float32, of `load_moe` or of transformers, with keys and values only.
        tokenizer: of it, that grammars know.
        count: of requests.
        seed: of what each request is.
        kv_memory: bytes of keys and values; small, so that kept ones leave.
        max_batch_size: most sequences at once; below `AT_ONCE`, so that requests wait.
    """
    cases = known_cases(model, tokenizer)
    settings = ServerSettings(kv_memory=kv_memory, max_batch_size=max_batch_size, max_step_tokens=64)
    with serving(model, tokenizer, settings) as (url, _):  # what is made once a process is made here
        asyncio.run(_Clients(url, cases, seed + 1).run(2 * AT_ONCE))
    before = held()
    with serving(model, tokenizer, settings) as (url, service):
        clients = _Clients(url, cases, seed)
        asyncio.run(clients.run(count))
        left = left_in(service, kv_memory)
        engine = service.figures["engine"]
    if not settles(lambda: held() <= before):
        left.append(f"threads and files {held()}, {before} before")
    return {
        "requests": count,
        "kinds": dict(clients.kinds),
        "bound": clients.bound,
        "checked": clients.checked,
        "wrong": clients.wrong,
        "left": left,
        "preempted": engine["preempted"],
        "kept_hits": engine["kept_hits"],
        "ended": engine["finished"],
    }


def known_cases(model: Any, tokenizer: Any) -> dict[bool, list[Case]]:
    """Return requests with their answers, each computed alone: those bound by a schema under True."""
    cases: dict[bool, list[Case]] = {True: [], False: []}
    with Engine(model, tokenizer, max_batch_size=1, share_prefixes=False) as engine:
        for is_bound in cases:
            for number in range(20):
                prompt = PROMPTS[number % len(PROMPTS)] * (1 + number // len(PROMPTS))
                most = 60 if is_bound else 4 + 2 * number
                temperature = 0.8 if number % 2 else 0.0
                params = SamplingParams(
                    max_new_tokens=most, temperature=temperature, seed=number, json_schema=SCHEMA if is_bound else None
                )
                (answer,) = engine.generate([prompt], params)
                body = {"prompt": prompt, "max_tokens": most, "temperature": temperature, "seed": number}
                body |= {"top_k": 0, "top_p": 1.0}  # else the checkpoint's own
                body |= {"json_schema": SCHEMA} if is_bound else {}
                cases[is_bound].append(Case(body, answer.text, answer.finish_reason))
    return cases


@contextmanager
def serving(model: Any, tokenizer: Any, settings: ServerSettings) -> Iterator[tuple[str, Any]]:
    """Run a server in this process; yield its URL and its service."""
    app = create_app(model, tokenizer, settings)
    with HttpServer(app, bind("127.0.0.1", 0), settings) as server:
        yield server.url, app.state.service


def left_in(service: Any, kv_memory: int) -> list[str]:
    """Return what is still held for requests once all clients have gone."""
    left = []
    if not settles(lambda: not service.num_under_way and service.figures["engine"]["running"] == 0):
        left.append(f"{service.num_under_way} requests under way")
    engine = service._worker._engine
    try:
        engine.check_integrity()
    except AssertionError as error:
        left.append(str(error))
    stats = engine.stats()
    if stats["running"] or stats["waiting"] or stats["kv_used_bytes"]:
        left.append(f"{stats['running']} running, {stats['waiting']} waiting, {stats['kv_used_bytes']} bytes in slots")
    if max(stats["kv_kept_bytes"], stats["kv_peak_bytes"]) > kv_memory:
        left.append(f"{stats['kv_peak_bytes']} bytes of keys and values at most, {kv_memory} allowed")
    return left


def held() -> tuple[int, int]:
    """Return the number of this process's Python threads and of its open files."""
    return threading.active_count(), psutil.Process().num_fds()


def settles(holds: Any) -> bool:
    """Return whether something comes to hold."""
    end_s = time.monotonic() + SETTLES_S
    while not holds():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.01)
    return True


class _Clients:
    """Clients that send one request after the other, some of them at once.

    Args:
        url: of the server.
        cases: with known answers.
        seed: of what each does.

    Attributes:
        kinds: how many requests there were of each kind.
        bound: those of them that a schema bound.
        checked: answers that came to their end and were compared.
        wrong: what was not as it should be.
    """

    def __init__(self, url: str, cases: dict[bool, list[Case]], seed: int) -> None:
        self._url = httpx.URL(url)
        self._cases = cases
        self._random = random.Random(seed)
        self.kinds: Counter[str] = Counter()
        self.bound = self.checked = 0
        self.wrong: list[str] = []

    async def run(self, count: int) -> None:
        """Send so many requests, `AT_ONCE` at a time."""
        numbers = iter(range(count))

        async def send(client: httpx.AsyncClient) -> None:
            for _ in numbers:
                await self._send(client)

        async with httpx.AsyncClient(base_url=self._url, timeout=120, trust_env=False) as client:
            await asyncio.gather(*(send(client) for _ in range(AT_ONCE)))

    async def _send(self, client: httpx.AsyncClient) -> None:
        (kind,) = self._random.choices([*KINDS], [*KINDS.values()])
        self.kinds[kind] += 1
        if kind == "malformed":
            await self._malformed()
            return
        is_bound = self._random.random() < BOUND_SHARE
        self.bound += is_bound
        case = self._random.choice(self._cases[is_bound])
        await getattr(self, f"_{kind}")(client, case)

    async def _whole(self, client: httpx.AsyncClient, case: Case) -> None:
        response = await client.post(TEXT, json=case.body)
        if response.status_code != 200:
            self.wrong.append(f"{response.status_code}: {response.text[:200]}")
            return
        choice = response.json()["choices"][0]
        self._check(case, choice["text"], choice["finish_reason"])

    async def _stream(self, client: httpx.AsyncClient, case: Case, most: int | None = None) -> None:
        """Read a stream, to its end or its first events."""
        text, reason, read = "", None, 0
        async with client.stream("POST", TEXT, json={**case.body, "stream": True}) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    self._check(case, text, reason)
                    return
                read += 1
                if most is not None and read >= most:
                    return
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    break
                text += event["choices"][0]["text"]
                reason = event["choices"][0]["finish_reason"] or reason
        self.wrong.append(f"a stream ended without its end, status {response.status_code}, after {text[:80]!r}")

    async def _leaves(self, client: httpx.AsyncClient, case: Case) -> None:
        """Leave in the middle of a stream, by closing its connection."""
        await self._stream(client, case, most=self._random.randint(1, 3))

    async def _cancels(self, client: httpx.AsyncClient, case: Case) -> None:
        """Close the connection before a whole answer has come, at once or a moment later."""
        content = json.dumps(case.body).encode()
        await self._raw(_request(content), wait_s=self._random.choice((0, 0, 0.005, 0.05)))

    async def _malformed(self) -> None:
        """Send what is no request, and see that it is refused where it is whole."""
        content, whole = self._random.choice(_NONSENSE)
        if whole:
            told = await self._raw(_request(content))
            if not told.startswith(b"HTTP/1.1 400 "):
                self.wrong.append(f"{content[:60]!r} was answered {told[:60]!r}")
        else:
            await self._raw(content, wait_s=self._random.choice((0, 0.005)))

    async def _raw(self, sent: bytes, wait_s: float | None = None) -> bytes:
        """Send bytes and return the answer; where `wait_s` is given, close the connection after it, without reading."""
        reader, writer = await asyncio.open_connection(self._url.host, self._url.port)
        try:
            writer.write(sent)
            await writer.drain()
            if wait_s is None:
                return await asyncio.wait_for(reader.read(4096), 120)
            await asyncio.sleep(wait_s)
            writer.transport.abort()
            return b""
        finally:
            writer.close()

    def _check(self, case: Case, text: str, reason: str | None) -> None:
        self.checked += 1
        if (text, reason) != (case.text, case.reason):
            self.wrong.append(f"{text[:80]!r} ({reason}) is not {case.text[:80]!r} ({case.reason}) of {case.body}")


def _request(content: bytes, length: int | None = None) -> bytes:
    head = f"POST {TEXT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length or len(content)}\r\n\r\n"
    return head.encode() + content


_NONSENSE = (  # and whether it is a whole body, that must be refused
    (b"{not json", True),
    (b"[1, 2]", True),
    (b'{"prompt": "\xff\xfe"}', True),
    (b'{"prompt": "x", "max_tokens": -1}', True),
    (b'{"prompt": "x", "no_such_field": 1}', True),
    (b'{"prompt": "x", "n": 1000}', True),
    (b'{"prompt": "x", "json_schema": {"type": "no such type"}}', True),
    (b'{"prompt": "x", "regex": "("}', True),
    (b"[" * 1000, True),
    (b"\x00\x01 nonsense\r\n\r\n", False),
    (_request(b'{"prompt": "x', 1000), False),
    (b"POST /v1/completions HTTP/1.1\r\nhost: loc", False),
)


def lines(found: dict) -> list[str]:
    """Return what is printed."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found["kinds"].items()))
    told = [
        f"{found['requests']} requests ({kinds}), {found['bound']} bound by a schema",
        f"{found['checked']} answers came to their end, {len(found['wrong'])} things were wrong",
        f"{found['preempted']} sequences gave way, {found['kept_hits']} began with kept tokens",
        "nothing is left" if not found["left"] else f"left: {'; '.join(found['left'])}",
    ]
    return told + [f"  {one}" for one in found["wrong"][:10]]
