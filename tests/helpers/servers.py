"""Servers on sockets of this machine: a tiny model behind an application, and the clients of tests."""

import json
import socket
import time
from contextlib import contextmanager

import httpx

from helpers.small_models import tiny_mixtral
from helpers.small_tokenizers import letter_tokenizer
from moeflow.server import ServerSettings, create_app
from moeflow.server.wire.http_server import HttpServer, bind

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}a:"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def small_model(**overrides):
    """A random Mixtral that knows every letter, with a context long enough for streams."""
    return tiny_mixtral(**{"max_position_embeddings": 4096, **overrides})


@contextmanager
def serving(model, tokenizer=None, send_bytes=None, **settings):
    """Run a server on a free port; yields a client of it, with `app` as an attribute."""
    settings = ServerSettings(**{"model_name": "org/tiny", **settings})
    app = create_app(model, tokenizer or letter_tokenizer(chat_template=TEMPLATE), settings)
    with running(app, settings, send_bytes) as client:
        client.app = app
        yield client


@contextmanager
def running(app, settings, send_bytes=None):
    """Run an application on a free port, with so many bytes on their way at most; yields a client of it."""
    bound = bind("127.0.0.1", 0)
    if send_bytes is not None:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
    with (
        HttpServer(app, bound, settings) as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
    ):
        yield client


def until(holds, timeout_s=60):
    """Ask until an answer holds; an answer takes a moment, so that nothing sleeps."""
    end_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end_s, "it never came to hold"


def finished(client, reason):
    """Return how many requests the engine has ended for a reason."""
    return client.get("/stats").json()["engine"]["finished"][reason]


def raw_socket(client, **options):
    """Return a socket that is connected to a client's server."""
    url = client.base_url
    connected = socket.create_connection((url.host, url.port), timeout=60)
    for name, value in options.items():
        connected.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    return connected


def raw_request(body, path=CHAT, length=None):
    """Return the bytes of a POST; its length may be a lie."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length or len(content)}\r\n\r\n"
    return head.encode() + content


def user(text):
    """Return messages of one user's text."""
    return [{"role": "user", "content": text}]


def events(response):
    """Yield the data of each event of a stream, parsed; "[DONE]" as it is."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def streamed(client, path, body):
    """Return all events of a stream."""
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(events(response))


def refused(client, status, path, body=None, **options):
    """Return the error of a request that must be refused."""
    response = client.post(path, json=body, **options) if body is not None else client.post(path, **options)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    return error


REFUSING = {"api_key": "right-key", "max_batch_size": 1, "max_waiting": 0, "max_body_bytes": 10_000}


def refusals(client):
    """Yield (status, a word of its message, API key, fields of a request) of requests that are refused, one by one.

    Args:
        client: of a server with the settings REFUSING; it answers nothing afterwards.
    """
    right = REFUSING["api_key"]
    yield 400, "temperature is -1", right, {"temperature": -1}
    yield 401, "API key", "wrong-key", {}
    yield 404, "gpt-4o", right, {"model": "gpt-4o"}
    yield 413, "longer than 10,000 bytes", right, {"messages": user("x" * 20_000)}
    long = {"messages": user("hello"), "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with client.stream("POST", CHAT, json=long, headers={"x-api-key": right}) as response:
        coming = events(response)
        next(coming)
        yield 429, "under way", right, {}
        coming.close()
    client.app.state.service.drain(0)
    yield 503, "stopping", right, {}
