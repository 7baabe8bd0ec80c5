"""Order between copies and kernels: CUDA streams and events, or nothing where host and device memory are one.

Two implementations of one small protocol. `CudaStreams` is not yet measured on hardware.
"""

import threading
from typing import Any, NamedTuple, Protocol

import torch


class Streams(Protocol):
    """Runs copies beside compute, ordered by events.

    An event is opaque: a point in the queue of copies or of compute. None is an event that has always happened.
    """

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: object, *, is_prefetch: bool = False) -> object:
        """Start a copy that begins after the event `after`; return the event of its end.

        Copies of one kind run in their order. A copy that is no prefetch does not wait for those that are.
        """

    def bring_down(self, target: torch.Tensor, source: torch.Tensor) -> object:
        """Start a copy to host memory, behind the caller's compute so far and before later; return its end's event."""

    def compute_event(self) -> object:
        """Return the event of all compute queued so far by the calling thread."""

    def wait(self, event: object) -> None:
        """Make later compute wait for the event, without blocking the calling thread if possible."""

    def synchronize(self, event: object) -> None:
        """Block the calling thread until the event has happened."""

    def done(self, event: object) -> bool:
        """Whether the event has happened."""

    def copy_s(self, event: object) -> float:
        """Return the seconds between the begin of a copy and its end, an event that has happened; 0 if unknown."""

    def finish(self) -> None:
        """Block the calling thread until every copy and every kernel has ended."""


class HostStreams:
    """One memory: copies have ended when they return."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: object, *, is_prefetch: bool = False) -> object:
        target.copy_(source)
        return None

    def bring_down(self, target: torch.Tensor, source: torch.Tensor) -> object:
        target.copy_(source)
        return None

    def compute_event(self) -> object:
        return None

    def wait(self, event: object) -> None:
        return None

    def synchronize(self, event: object) -> None:
        return None

    def done(self, event: object) -> bool:
        return True

    def copy_s(self, event: object) -> float:
        return 0.0

    def finish(self) -> None:
        return None


_HIGH = -1  # priority of a stream
_PIECE_BYTES = 2 << 20  # of a copy; large enough to fill the link


class _Point(NamedTuple):
    """A point in a stream's queue. Its events are used again when nobody can ask for the point any more."""

    events: tuple[torch.cuda.Event, ...]  # of a copy's begin and end, or of the point alone
    unused: list[tuple[torch.cuda.Event, ...]]

    def __hash__(self) -> int:
        return hash(self.events)

    def __del__(self) -> None:
        self.unused.append(self.events)


class CudaStreams:
    """Two copy streams beside the caller's current stream, ordered by events. Touches its own device alone.

    A copy runs in pieces, so that one on demand shares the link with the prefetches that were started before it, and
    does not wait for all of them.

    Args:
        device: the GPU; the current one, for good, where it has no number.
    """

    def __init__(self, device: torch.device) -> None:
        self._outside = threading.local()  # `stream`: the current one of a thread whose copy an interrupt broke off
        # Events are recorded anew only when nothing holds their point: a wait is for the record that it found.
        self._unused_pairs: list[tuple[torch.cuda.Event, ...]] = []
        self._unused: list[tuple[torch.cuda.Event, ...]] = []
        with torch.cuda.device(device):
            self._demanded = torch.cuda.Stream(device, priority=_HIGH)
            self._prefetched = torch.cuda.Stream(device)
            self._device = self._demanded.device
            # The pool may lie on memory that queued kernels of an earlier owner still use.
            for stream in (self._demanded, self._prefetched):
                stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: object, *, is_prefetch: bool = False) -> object:
        stream = self._prefetched if is_prefetch else self._demanded
        self._leave_copy_stream()
        begin, end = events = _take(self._unused_pairs, 2)
        # Not torch.cuda.stream: where another device is current, it makes a context there as it ends.
        with torch.cuda.device(self._device):
            outside = torch.cuda.current_stream(self._device)
            self._outside.stream = outside
            try:
                torch.cuda.set_stream(stream)
                if after is not None:
                    stream.wait_event(_end(after))
                begin.record(stream)  # behind earlier copies: only its own time counts
                for to, of in zip(target.split(_PIECE_BYTES), source.split(_PIECE_BYTES), strict=True):
                    to.copy_(of, non_blocking=True)
                end.record(stream)
            except Exception:
                end.record(stream)
                end.synchronize()  # pieces may be under way, and the caller gets no event to wait for
                raise
            finally:
                torch.cuda.set_stream(outside)
                self._outside.stream = None
        return _Point(events, self._unused_pairs)

    def bring_down(self, target: torch.Tensor, source: torch.Tensor) -> object:
        self._leave_copy_stream()
        with torch.cuda.device(self._device):
            target.copy_(source, non_blocking=True)
        return self.compute_event()

    def compute_event(self) -> object:
        self._leave_copy_stream()
        (event,) = events = _take(self._unused, 1)
        event.record(torch.cuda.current_stream(self._device))
        return _Point(events, self._unused)

    def wait(self, event: object) -> None:
        self._leave_copy_stream()
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(_end(event))

    def synchronize(self, event: object) -> None:
        if event is not None:
            _end(event).synchronize()

    def done(self, event: object) -> bool:
        return event is None or _end(event).query()

    def copy_s(self, event: object) -> float:
        if not isinstance(event, _Point) or len(event.events) == 1:
            return 0.0
        begin, end = event.events
        return begin.elapsed_time(end) / 1000

    def finish(self) -> None:
        self._leave_copy_stream()
        torch.cuda.synchronize(self._device)

    def _leave_copy_stream(self) -> None:
        """Make the caller's own stream current again where Ctrl-C came between a copy and that."""
        outside = getattr(self._outside, "stream", None)
        if outside is not None:
            with torch.cuda.device(self._device):
                torch.cuda.set_stream(outside)
            self._outside.stream = None


def _take(unused: list[tuple[torch.cuda.Event, ...]], number: int) -> tuple[torch.cuda.Event, ...]:
    """Return events that nothing holds, new ones where there are none; two of them tell the time between them."""
    try:
        return unused.pop()
    except IndexError:
        return tuple(torch.cuda.Event(enable_timing=number == 2) for _ in range(number))


def _end(event: Any) -> torch.cuda.Event:
    return event.events[-1]
