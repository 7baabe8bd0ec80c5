"""The listening socket where the process may open no more files."""

import errno
import os
import resource
import socket
from contextlib import ExitStack, contextmanager, suppress

import pytest

from helpers.servers import CHAT, raw_socket, serving, user
from moeflow.server.wire.http_server import bind
from moeflow.server.wire.listener import Listener

HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


@contextmanager
def no_more_files():
    """Take every file that this process may open; yields their numbers."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir("/proc/self/fd"))) + 3
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    taken = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield taken
    finally:
        for number in taken:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_connections_are_turned_away_and_the_server_goes_on(small, caplog):
    with serving(small) as client, ExitStack() as held:
        address = (client.base_url.host, client.base_url.port)
        body = {"messages": user("hello"), "max_tokens": 2}
        assert client.post(CHAT, json=body).status_code == 200  # this connection is kept alive
        late = [held.enter_context(socket.socket()) for _ in range(3)]
        with no_more_files():
            for connection in late:
                connection.settimeout(60)
                connection.connect(address)
                assert connection.recv(4096).startswith(b"HTTP/1.1 503")
            assert client.post(CHAT, json=body).status_code == 200
        with raw_socket(client) as again:
            again.sendall(HEALTH)
            assert again.makefile("rb").read().startswith(b"HTTP/1.1 200")
    assert caplog.text.count("no more files") == 1
    assert "asyncio" not in {record.name for record in caplog.records}


def test_without_the_spare_file_the_connection_waits_and_is_not_tried_in_a_loop():
    with socket.socket() as late, ExitStack() as held:
        with no_more_files() as taken:
            os.close(taken.pop())
            listener = held.enter_context(Listener())
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            listener.setblocking(False)
            late.connect(listener.getsockname())
            for _ in range(2):
                with pytest.raises(OSError, match="Too many open files") as told:
                    listener.accept()
                assert told.value.errno == errno.EMFILE
                with pytest.raises(BlockingIOError):
                    listener.accept()
        listener.accept()[0].close()


def test_a_listener_that_is_closed_keeps_no_file():
    before = os.listdir("/proc/self/fd")
    bind("127.0.0.1", 0).close()
    assert os.listdir("/proc/self/fd") == before
