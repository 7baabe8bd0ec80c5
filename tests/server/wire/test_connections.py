"""Limits of connections: their number, headers that do not come, and clients that read nothing."""

import resource
from contextlib import ExitStack

import pytest

from helpers.servers import CHAT, finished, raw_request, raw_socket, serving, until, user

HELLO = {"messages": user("hello"), "max_tokens": 2}


def closed(connection):
    """Whether the server ended a connection, with or without a word."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


def test_connections_beyond_the_limit_are_turned_away_and_room_is_used_again(small):
    with serving(small, max_connections=20) as client, ExitStack() as held:
        assert client.get("/health").status_code == 200  # this one is kept alive
        many = [held.enter_context(raw_socket(client)) for _ in range(200)]
        for late in many[-100:]:
            assert late.makefile("rb").read().startswith(b"HTTP/1.1 503")
        assert client.post(CHAT, json=HELLO).status_code == 200
        held.close()

        def answers():
            with raw_socket(client) as again:
                again.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
                return again.makefile("rb").read().startswith(b"HTTP/1.1 200")

        until(answers)


@pytest.mark.parametrize("begin", [b"", b"GET /heal", b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-a: b"])
def test_headers_that_do_not_come_end_the_connection(small, begin):
    with serving(small, header_timeout_s=0.2) as client, raw_socket(client) as slow:
        slow.sendall(begin)
        assert closed(slow)
        assert client.get("/health").status_code == 200


def test_headers_of_a_second_request_are_waited_for_no_longer(small):
    with serving(small, header_timeout_s=0.2) as client, raw_socket(client) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /he")
        assert slow.recv(4096).startswith(b"HTTP/1.1 200")
        slow.sendall(b"a")
        assert closed(slow)


@pytest.mark.parametrize(
    "limits", [{"max_unread": 20}, {"send_timeout_s": 0.2, "max_unread": 10**6}], ids=["unread", "stalled"]
)
def test_a_client_that_never_reads_is_cut_off_and_others_go_on(small, limits):
    body = {
        **HELLO,
        "max_tokens": 4000,
        "n": 2,
        "stream": True,
        "logprobs": True,
        "top_logprobs": 20,
        "ignore_eos": True,
    }
    with serving(small, send_bytes=4096, **limits) as client, raw_socket(client, SO_RCVBUF=4096) as unread:
        unread.sendall(raw_request(body))
        until(lambda: finished(client, "cancelled") == 2)
        assert finished(client, "length") == 0
        assert client.post(CHAT, json=HELLO).status_code == 200
        assert client.get("/stats").json()["engine"]["running"] == 0


def test_connections_leave_half_of_the_files_to_the_model(small):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    with ExitStack() as held:
        try:
            client = held.enter_context(serving(small))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        many = [held.enter_context(raw_socket(client)) for _ in range(130)]
        assert many[-1].makefile("rb").read().startswith(b"HTTP/1.1 503")
