"""Opens many connections to a server, and says a byte in each now and then: a program that tests start.

    python many_connections.py HOST PORT NUMBER

A third of the connections say nothing, a third are in their headers, a third in their body; these say one byte more in
each second. It writes how many are open, and goes on until its input ends or the server has closed them all. Then it
writes how many were closed by the server, and how many of those with an answer of 503.
"""

import contextlib
import resource
import select
import socket
import sys
import time

_AT_ONCE = 256  # fewer than the server's queue holds
_HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
_BEGINS = (
    b"",
    _HEALTH + b"x-a: ",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n",
)


def allow_files(wanted):
    """Raise the limit of open files as far as it may go; return the limits before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    return soft, hard


def connect(address, number):
    """Return connections that have been accepted or turned away, each of which has begun to speak."""
    opened = []
    while len(opened) < number:
        opened += [socket.create_connection(address, timeout=60) for _ in range(min(_AT_ONCE, number - len(opened)))]
        with socket.create_connection(address, timeout=60) as last, contextlib.suppress(ConnectionResetError):
            last.sendall(_HEALTH + b"connection: close\r\n\r\n")
            while last.recv(4096):  # once this one has its answer the queue is empty
                pass
    for place, connection in enumerate(opened):
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.send(_BEGINS[place % 3])
    return opened


def speak(connections):
    """Say a byte a second in two thirds of the connections until the input ends; return the answers of those closed."""
    waiting = {connection.fileno(): connection for connection in connections}
    speaking = {connection.fileno() for place, connection in enumerate(connections) if _BEGINS[place % 3]}
    answers = dict.fromkeys(waiting, b"")
    closed = []
    poll = select.poll()
    for number in (sys.stdin.fileno(), *waiting):
        poll.register(number, select.POLLIN)
    next_s, last = time.monotonic(), False
    while waiting:
        found = poll.poll(0 if last else 1000 * max(0.0, next_s - time.monotonic()))
        if last and not found:
            break
        for number, _ in found:
            if number == sys.stdin.fileno():
                poll.unregister(number)
                last = True  # what has come by now is still read
                continue
            try:
                said = waiting[number].recv(4096)
            except OSError:
                said = b""
            answers[number] += said
            if not said:
                closed.append(answers[number])
                poll.unregister(number)
                waiting.pop(number).close()
        if time.monotonic() >= next_s:
            next_s = time.monotonic() + 1
            for number in speaking & waiting.keys():
                with contextlib.suppress(OSError):
                    waiting[number].send(b"x")
    return closed


def main():
    """Open them, speak, and say how they were answered."""
    host, port, number = sys.argv[1:]
    allow_files(int(number) + 100)
    connections = connect((host, int(port)), int(number))
    print(len(connections), flush=True)
    closed = speak(connections)
    print(len(closed), sum(answer.startswith(b"HTTP/1.1 503") for answer in closed), flush=True)


if __name__ == "__main__":
    main()
