"""Ten thousand connections, or as many as the machine allows, silent or a byte now and then: a client gets its answer
meanwhile, and nothing is left of them. `record_property` says how many they were."""

import os
import resource
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import openai
import pytest

from helpers.many_connections import allow_files
from helpers.paths import ROOT
from helpers.servers import CHAT, events, raw_socket, serving, until, user

HELLO = {"messages": user("hello"), "max_tokens": 2}
WANTED = 10_000
OWN_FILES = 200  # of a test's process


@pytest.fixture
def number():
    """How many connections are opened: the server holds at most half of its process's files."""
    before = allow_files(2 * WANTED + OWN_FILES)
    yield min(WANTED, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 - OWN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextmanager
def many(client, number):
    """Have a process of its own hold connections; yields it, once all are open or turned away."""
    url = client.base_url
    command = [sys.executable, str(ROOT / "tests/helpers/many_connections.py"), url.host, str(url.port), str(number)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == f"{number}\n"
            yield process
        finally:
            process.kill()


def closed_ones(process, *, all_of_them=False):
    """Return how many connections the server has closed, and how many of these with 503; the others end now.

    Args:
        all_of_them: wait until the server has closed all.
    """
    if all_of_them:
        process.wait(60)
    told, _ = process.communicate(timeout=60)
    return tuple(map(int, told.split()))


def num_files(client):
    """Return how many files this process has open, the server's and one connection of the client's among them."""
    assert client.get("/health").status_code == 200
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
def test_ten_thousand_connections_keep_no_client_from_its_answer(small, number, record_property):
    record_property("connections", number)
    with serving(small, max_connections=WANTED, header_timeout_s=600, body_timeout_s=600) as client:
        answer = client.post(CHAT, json=HELLO).json()["choices"]
        before = num_files(client)
        with many(client, number) as process:
            assert num_files(client) >= before + number
            for _ in range(3):
                assert client.post(CHAT, json=HELLO).json()["choices"] == answer
            assert closed_ones(process) == (0, 0)
        until(lambda: num_files(client) <= before)
        assert client.post(CHAT, json=HELLO).json()["choices"] == answer


@pytest.mark.slow
def test_connections_that_say_a_byte_now_and_then_are_ended_in_time(small):
    with serving(small, header_timeout_s=2.5, body_timeout_s=2.5) as client:
        answer = client.post(CHAT, json=HELLO).json()["choices"]
        before = num_files(client)
        with many(client, 300) as process:
            assert client.post(CHAT, json=HELLO).json()["choices"] == answer
            assert closed_ones(process, all_of_them=True) == (300, 0)
        until(lambda: num_files(client) <= before)
        assert client.post(CHAT, json=HELLO).json()["choices"] == answer


@pytest.mark.slow
def test_of_ten_thousand_those_beyond_the_limit_are_told_so_and_the_others_held(small, number, record_property):
    record_property("connections", number)
    most = 512
    with serving(small, max_connections=most, header_timeout_s=600, body_timeout_s=600) as client:
        before = num_files(client)
        asked = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
        long = {"messages": user("hello"), "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with asked, client.stream("POST", CHAT, json=long) as response:
            coming = events(response)
            next(coming)
            with many(client, number) as process:
                assert next(coming)["choices"]
                with pytest.raises(openai.InternalServerError, match="too many connections") as told:
                    asked.models.list()
                assert told.value.status_code == 503
                closed, answered = closed_ones(process)
            assert closed == number - (most - 1)
            assert answered > 0
            coming.close()
        until(lambda: num_files(client) <= before)


@pytest.mark.parametrize("before", [0, 100])
def test_a_client_that_is_turned_away_while_it_sends_is_not_cut_off(small, before):
    with serving(small, max_connections=1) as client, ExitStack() as silent:
        assert client.get("/health").status_code == 200  # this one is kept alive
        for _ in range(before):  # more than may leave in peace at once
            silent.enter_context(raw_socket(client))
        with raw_socket(client) as late:
            answer = late.makefile("rb")
            assert answer.readline().startswith(b"HTTP/1.1 503")
            for _ in range(20):  # a cut connection would end the second of these with an error
                late.sendall(b"x" * 100_000)
            assert b"too_many_connections" in answer.read()
