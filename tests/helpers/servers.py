"""Servers on sockets of this machine: a tiny model behind an application, and the clients of tests."""

import json
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
def serving(model, tokenizer=None, **settings):
    """Run a server on a free port; yields a client of it, with `app` as an attribute."""
    settings = ServerSettings(**{"model_name": "org/tiny", **settings})
    app = create_app(model, tokenizer or letter_tokenizer(chat_template=TEMPLATE), settings)
    with running(app, settings) as client:
        client.app = app
        yield client


@contextmanager
def running(app, settings):
    """Run an application on a free port; yields a client of it."""
    with (
        HttpServer(app, bind("127.0.0.1", 0), settings) as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
    ):
        yield client


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
