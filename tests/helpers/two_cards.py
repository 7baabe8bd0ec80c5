"""A stand-in for the driver under `torch.cuda` on a machine with two cards; torch's own guards run above it.

Knows which card each thread has current, which cards were touched, and each thread's current stream. Tensors stay on
the CPU.
"""

import sys
import threading
from contextlib import suppress
from types import SimpleNamespace

import torch


class TwoCards:
    """Puts itself in the place of the driver.

    Args:
        monkeypatch: pytest's.
    """

    def __init__(self, monkeypatch):
        self.touched = set()  # cards with a context
        self._thread = threading.local()
        cards = self

        class Stream:
            def __init__(self, device=None, priority=0):
                self.device = torch.device(device)
                cards.touched.add(self.device.index)

            def wait_stream(self, other):
                assert other.device == self.device

            def wait_event(self, event):
                assert event.device in (None, self.device)

        class Event:
            def __init__(self, enable_timing=False):
                self.device = None

            def record(self, stream):
                self.device = stream.device
                cards.touched.add(stream.device.index)

            def query(self):
                return True

        self._default = [Stream(torch.device("cuda", number)) for number in range(2)]
        self.touched.clear()
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", self.current_stream)
        monkeypatch.setattr(torch.cuda, "set_stream", self.set_stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: cards.touched.add(cards._number(device)))
        monkeypatch.setattr(torch.cuda, "_exchange_device", self._exchange)
        monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", lambda number: cards._exchange(number, touch=False))

    @property
    def current(self):
        """Number of the card that is current in this thread."""
        return getattr(self._thread, "card", 0)

    def current_stream(self, device=None):
        """Return this thread's current stream of a card; it makes no context."""
        number = self._number(device)
        return getattr(self._thread, "streams", self._default)[number]

    def set_stream(self, stream):
        """Make a stream current, and its card too, as torch does."""
        number = stream.device.index
        if number != self.current:
            self._exchange(number)
        streams = list(getattr(self._thread, "streams", self._default))
        streams[number] = stream
        self._thread.streams = streams

    def _number(self, device):
        return self.current if device is None else torch.device(device).index

    def _exchange(self, number, *, touch=True):
        before = self.current
        if number >= 0:
            self._thread.card = number
            if touch:
                self.touched.add(number)
        return before


def interrupt_at_each_line(call, files):
    """Run `call` again and again, with a KeyboardInterrupt at one line of `files` more each time; yield after each."""
    for number in range(1000):
        seen = SimpleNamespace(lines=0, struck=False)

        def trace(frame, event, argument, seen=seen, number=number):
            if frame.f_code.co_filename not in files:
                return None
            if event == "line" and not seen.struck:
                if seen.lines == number:
                    seen.struck = True
                    raise KeyboardInterrupt
                seen.lines += 1
            return trace

        with suppress(KeyboardInterrupt):
            sys.settrace(trace)
            try:
                call()
            finally:
                sys.settrace(None)
        if not seen.struck:
            return
        yield number
