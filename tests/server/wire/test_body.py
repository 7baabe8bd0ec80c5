"""Bodies: what is no JSON object, too long, too deep or too slow is refused; the connection is of use or closed."""

import json

import pytest

from helpers.servers import CHAT, raw_request, raw_socket, refused, serving, user

HELLO = {"messages": user("hello"), "max_tokens": 2}


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "it is not JSON"),
        (b"hello", "it is not JSON"),
        (b'{"messages": [', "it is not JSON"),
        (b"[1]", "no object"),
        (b"null", "no object"),
        (b'"text"', "no object"),
        (b'{"a": "\xff\xfe"}', "it is not JSON"),
        (b"\x00\x01\x02", "it is not JSON"),
        ("{}".encode("utf-16"), "it is not JSON"),
        (b'{"n": 1, "n": 2}', "twice"),
        (b'{"n": ' + b"9" * 10_000 + b"}", "it is not JSON"),
        (b'{"a": ' * 65 + b"1" + b"}" * 65, "deeper than 64 levels"),
        (b'{"a": ' + b"[" * 100_000, "deeper than 64 levels"),
        (b"[" * 1_000_000, "deeper than 64 levels"),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else value,
)
def test_a_body_that_is_no_object_is_refused(client, content, word):
    error = refused(client, 400, CHAT, content=content)
    assert word in error["message"]
    assert len(error["message"]) < 400


def test_brackets_in_texts_are_no_levels(client):
    body = {**HELLO, "messages": user('say "[[{{\\' + "[{" * 100)}
    assert client.post(CHAT, json=body).status_code == 200
    assert client.post(CHAT, content=b"\xef\xbb\xbf" + json.dumps(HELLO).encode()).status_code == 200


def test_a_long_body_is_refused_whatever_length_it_names(small):
    with serving(small, max_body_bytes=1000) as client:
        error = refused(client, 413, CHAT, {**HELLO, "user": "x" * 1000})
        assert error["code"] == "body_too_long"
        assert "1,000 bytes" in error["message"]

        def endless():
            while True:
                yield b"x" * 100

        response = client.post(CHAT, content=endless())  # in chunks, with no length at all
        assert response.status_code == 413
        assert client.post(CHAT, json=HELLO).status_code == 200


def test_a_body_that_comes_byte_by_byte_is_given_up(small):
    with serving(small, body_timeout_s=0.2) as client, raw_socket(client) as slow:
        slow.sendall(raw_request({}, length=1000))
        answer = slow.makefile("rb").read()  # until the server closes
        assert answer.startswith(b"HTTP/1.1 408")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_slow"


def test_a_client_that_leaves_in_its_body_leaves_nothing(client):
    with raw_socket(client) as leaving:
        leaving.sendall(raw_request(HELLO, length=1000))
    assert client.post(CHAT, json=HELLO).status_code == 200
