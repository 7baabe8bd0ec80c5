"""A GPU of queues in Python: what is launched waits in its stream, and runs in any order that events allow.

Stands in for `torch.cuda` where `moeflow.offload.streams` uses it. Memory is the CPU's. Which queue goes on next, and
how far, is drawn at random; a copy fills its target with garbage when it begins. So a missing wait shows as wrong
values, and the race detector, which sees every launch, names it even where the values happen to be right.
"""

import collections
import contextlib
import threading
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GARBAGE = 0xFF  # four of these bytes are a NaN
_PAGE = 4096
_SMALL = 256  # bytes of what may share a page with what others use, such as a row of a table


def pages(address, num_bytes) -> set[int]:
    """Return what a piece of memory is to the detector: the pages that it touches, or its address where it is small."""
    return {address} if num_bytes < _SMALL else set(range(address - address % _PAGE, address + num_bytes, _PAGE))


class QueuedDevice:
    """The streams of the GPUs of one machine.

    Args:
        random: draws what runs next.
        detector: a `RaceDetector`.
        step: lets other threads run.
        eagerness: 0 to 1, how much of the queues runs without being waited for.
        before_copy: called before each copy is queued; it may raise.

    Attributes:
        cuda: the stand-in for `torch.cuda`.
        now: seconds on a clock that only work moves.
        touched: numbers of GPUs that were used.
        num_events: how many events were made.
    """

    def __init__(self, random, detector, step=lambda: None, *, eagerness=0.5, before_copy=lambda: None):
        self.random, self.detector, self.step = random, detector, step
        self.before_copy = before_copy
        self.now, self.num_events, self.touched = 0.0, 0, set()
        self.current_device = 0
        self._eagerness = eagerness
        self._streams: list[Stream] = []
        self._defaults: dict[int, Stream] = {}
        self._current = threading.local()
        self.cuda = SimpleNamespace(
            Stream=lambda device=None, priority=0: Stream(self, device),
            Event=lambda enable_timing=False: Event(self, enable_timing),
            stream=self.stream,
            set_stream=self.set_stream,
            device=self.device,
            current_stream=self.current_stream,
            synchronize=self.synchronize,
        )

    def clock(self) -> float:
        """Return `now`, which goes on a little."""
        self.now += 1e-7
        return self.now

    def index_of(self, device) -> int:
        """Return the number of a GPU, of the current one where none is named."""
        device = torch.device("cuda", device) if isinstance(device, int) else device and torch.device(device)
        index = self.current_device if device is None or device.index is None else device.index
        self.touched.add(index)
        return index

    def current_stream(self, device=None) -> "Stream":
        """Return the stream of the calling thread, as torch.cuda.current_stream."""
        index = self.index_of(device)
        chosen = getattr(self._current, "streams", {}).get(index)
        if chosen is None:
            if index not in self._defaults:
                self._defaults[index] = Stream(self, index)
            chosen = self._defaults[index]
        return chosen

    @contextlib.contextmanager
    def stream(self, stream):
        """Make a stream the calling thread's; copies in here are queued in it, as torch.cuda.stream."""
        index, before = stream.device.index, dict(getattr(self._current, "streams", {}))
        self.touched.add(index)
        self._current.streams = {**before, index: stream}
        try:
            with _Copies(self, stream):
                yield
        finally:
            self._current.streams = before

    def set_stream(self, stream) -> None:
        """Make a stream the calling thread's until another is, as torch.cuda.set_stream."""
        index = stream.device.index
        self.touched.add(index)
        self._current.streams = {**getattr(self._current, "streams", {}), index: stream}
        pushed, self._current.pushed = getattr(self._current, "pushed", None), None
        if pushed is not None:
            pushed.__exit__(None, None, None)
        else:
            self._current.pushed = _Copies(self, stream)
            self._current.pushed.__enter__()

    @contextlib.contextmanager
    def device(self, device):
        """Make a GPU the current one, as torch.cuda.device."""
        before, self.current_device = self.current_device, self.index_of(device)
        try:
            yield
        finally:
            self.current_device = before

    def synchronize(self, device=None) -> None:
        """Block the calling thread until everything queued on a GPU has run."""
        index = self.index_of(device)
        for stream in list(self._streams):
            if stream.device.index == index:
                mark = self.detector.mark(stream.number)
                self.run_until(lambda stream=stream: not stream.queue)
                self.detector.wait(self.detector.host(), mark)

    def launch(self, name, steps, *, reads=frozenset(), writes=frozenset(), stream=None) -> None:
        """Queue a kernel: `steps`, functions that run one after the other, some time.

        Args:
            name: in the detector's messages.
            reads: addresses of the memory that it reads.
            writes: addresses of the memory that it writes.
            stream: the calling thread's when None.
        """
        stream = stream or self.current_stream()
        self.enqueue(stream, [lambda step=step: step() or True for step in steps], name, reads, writes)

    def enqueue(self, stream, steps, name="", reads=frozenset(), writes=frozenset()) -> None:
        """Queue functions that return whether they could run; one that could not is asked again."""
        self.step()
        self.detector.wait(stream.number, self.detector.mark(self.detector.host()))
        if reads or writes:
            self.detector.access(stream.number, name, reads=reads, writes=writes)
        stream.queue.extend(steps)
        while self.random.random() < self._eagerness and self._run_one():
            pass

    def host_access(self, name, *, reads=frozenset(), writes=frozenset()) -> None:
        """Enter what the calling thread itself reads or writes, at this moment."""
        self.step()
        self.detector.access(self.detector.host(), name, reads=reads, writes=writes)

    def run_until(self, happened) -> None:
        """Run what is queued, and other threads, until something has happened."""
        while not happened():
            self.step()
            assert happened() or self._run_one(), "a thread waits for what is not queued"

    def _run_one(self) -> bool:
        """Run the head of one queue; return whether any could run."""
        queued = [stream for stream in self._streams if stream.queue]
        self.random.shuffle(queued)
        for stream in queued:
            if stream.queue[0]():
                stream.queue.popleft()
                self.now += 1e-6
                return True
        return False


class Stream:
    """As torch.cuda.Stream."""

    def __init__(self, machine, device):
        self.device = torch.device("cuda", machine.index_of(device))
        self.number = machine.detector.new_stream()
        self.queue = collections.deque()
        self._machine = machine
        machine._streams.append(self)

    def wait_event(self, event):
        point = event.point
        if point is not None:
            self._machine.enqueue(self, [lambda: point.time is not None])
            self._machine.detector.wait(self.number, point.mark)

    def wait_stream(self, stream):
        event = Event(self._machine, False)
        event.record(stream)
        self.wait_event(event)


class Event:
    """As torch.cuda.Event: a record anew does not move those that wait for the one before."""

    def __init__(self, machine, timed):
        machine.num_events += 1
        self.point = None
        self._machine, self._timed = machine, timed

    def record(self, stream=None):
        stream = stream or self._machine.current_stream()
        point = _Point()

        def happen():
            point.time = self._machine.now
            return True

        self._machine.enqueue(stream, [happen])
        point.mark = self._machine.detector.mark(stream.number)
        self.point = point

    def query(self):
        self._machine.step()
        point = self.point
        if point is not None and point.time is not None:
            self._machine.detector.wait(self._machine.detector.host(), point.mark)
        return point is None or point.time is not None

    def synchronize(self):
        point = self.point
        if point is not None:
            self._machine.run_until(lambda: point.time is not None)
            self._machine.detector.wait(self._machine.detector.host(), point.mark)

    def elapsed_time(self, end):
        points = (self.point, end.point)
        if not (self._timed and end._timed) or None in points or None in [point.time for point in points]:
            raise RuntimeError("CUDA error: both events must have timing, be recorded and have happened")
        return 1000 * (end.point.time - self.point.time)


class _Point:
    """One record of an event: when it happened, None before; and its point for the detector."""

    def __init__(self):
        self.time = None
        self.mark = 0


class _Copies(TorchDispatchMode):
    """Queues copies from memory to memory instead of running them."""

    def __init__(self, machine, stream):
        super().__init__()
        self._machine, self._stream = machine, stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        target, source, *non_blocking = args
        to, of, reads = target.numpy(), source.numpy(), pages(source.data_ptr(), source.nbytes)
        if non_blocking == [True] and target.dtype != torch.int32:
            self._machine.before_copy()
        else:  # a table, from pageable memory, which the driver copies before it returns
            of, reads = of.copy(), set()
        steps = [lambda: to.fill(GARBAGE) or True, lambda: to.__setitem__(slice(None), of) or True]
        self._machine.enqueue(self._stream, steps, "a copy", reads, pages(target.data_ptr(), target.nbytes))
        return target
