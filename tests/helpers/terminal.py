"""A chat in a process of its own at the other end of a pseudo-terminal."""

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager

from helpers.paths import ROOT
from moeflow.engine.sampling_params import SamplingParams

EIGHT = SamplingParams(max_new_tokens=8)


DEADLINE_S = 60


PROMPT = r"(?m)^>"


ENDLESS = 30_000  # tokens: more than the model says before a test is over


DRIVER = """
import json, os, sys
if sys.stdin.isatty():
    os.close(os.open(os.ttyname(0), os.O_RDWR))  # makes it the controlling terminal, where Ctrl-C comes from
from transformers import AutoTokenizer
from moeflow import load_moe
from moeflow.chat.chat import run_chat
from moeflow.engine.sampling_params import SamplingParams
folder, options = sys.argv[1], json.loads(sys.argv[2])
model = load_moe(folder, expert_memory="75%")
sys.exit(run_chat(model, AutoTokenizer.from_pretrained(folder), SamplingParams(**options), name="tiny"))
"""


def driver_command(folder, **options):
    return [sys.executable, str(folder / "driver.py"), str(folder), json.dumps(options)]


class Terminal:
    """The other end of a pseudo-terminal: types, and reads until something has appeared."""

    def __init__(self, master, process):
        self.master = master
        self.process = process
        self.unread = ""
        self.greeting = ""

    def type(self, text):
        os.write(self.master, text.encode())

    def expect(self, pattern):
        """Read up to and including a match of `pattern`; returns everything up to its end."""
        deadline = time.monotonic() + DEADLINE_S
        while not (found := re.search(pattern, self.unread)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.unread!r}"
            chunk = self._read(deadline)
            assert chunk is not None, f"the program ended without {pattern!r}: {self.unread!r}"
            # Colours and cursor movements go; what they move around stays in the order it was written.
            self.unread = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r", "", self.unread + chunk)
        text, self.unread = self.unread[: found.end()], self.unread[found.end() :]
        return text

    def ask(self, line, answer):
        """Type a line, and read up to `answer` and the next prompt."""
        self.type(line + "\r")
        text = self.expect(answer)
        self.expect(PROMPT)
        return text

    def expect_end(self):
        deadline = time.monotonic() + DEADLINE_S
        while self._read(deadline) is not None:
            assert time.monotonic() < deadline, "the program did not end"
        return self.process.wait(timeout=DEADLINE_S)

    def _read(self, deadline):
        """Return what has arrived by `deadline`, None once the program has closed its end."""
        ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            return ""
        try:
            return os.read(self.master, 65536).decode(errors="replace") or None
        except OSError:  # Linux says EIO where others say end of file
            return None


@contextmanager
def open_terminal(folder, cache, environment, **options):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    env |= {"PYTHONPATH": str(ROOT), "MOEFLOW_CACHE": str(cache), "PROMPT_TOOLKIT_NO_CPR": "1", "LANG": "C.UTF-8"}
    env |= environment
    process = subprocess.Popen(
        driver_command(folder, **options), stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True
    )
    os.close(slave)
    terminal = Terminal(master, process)
    try:
        terminal.greeting = terminal.expect("tiny · ") + terminal.expect(PROMPT)
        yield terminal
    finally:
        process.kill()
        process.wait()
        os.close(master)
