"""Order between copies and kernels: CUDA streams and events, or nothing where memory is one.

Two implementations of one small protocol. `CudaStreams` is not yet measured on hardware.
"""

from typing import Protocol

import torch


class Streams(Protocol):
    """Copies run beside compute; an event is what one of them has reached.

    An event is opaque; None is an event that has always happened.
    """

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: object) -> object:
        """Start a copy that begins after the event `after`; return the event of its end."""

    def compute_event(self) -> object:
        """Return the event of all compute queued so far by the calling thread."""

    def wait(self, event: object) -> None:
        """Make later compute wait for the event, without blocking the calling thread if possible."""

    def synchronize(self, event: object) -> None:
        """Block the calling thread until the event has happened."""

    def done(self, event: object) -> bool:
        """Whether the event has happened."""

    def finish(self) -> None:
        """Block the calling thread until every copy and every kernel has ended."""


class HostStreams:
    """One memory: copies have ended when they return."""

    def copy(self, target, source, after):
        target.copy_(source)
        return None

    def compute_event(self):
        return None

    def wait(self, event):
        return None

    def synchronize(self, event):
        return None

    def done(self, event):
        return True

    def finish(self):
        return None


class CudaStreams:
    """A copy stream beside the caller's current stream, ordered by events."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        # The pool may lie on memory that queued kernels of an earlier owner still use.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def copy(self, target, source, after):
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event

    def compute_event(self):
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, event):
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def synchronize(self, event):
        if event is not None:
            event.synchronize()

    def done(self, event):
        return event is None or event.query()

    def finish(self):
        torch.cuda.synchronize(self._device)
