"""PyTorch's race detector (`TORCH_CUDA_SANITIZER`) with the host in it: each thread is a stream of its own.

The detector is plain Python and needs no GPU. It knows accesses of streams, and what each stream has waited for; an
access that is not ordered behind an earlier one to the same memory is a race, whenever either of them really runs.
"""

import itertools
import threading
from collections import defaultdict

from torch.cuda._sanitizer import EventHandler


class RaceDetector:
    """Follows streams, threads and the points in them that others wait for.

    Attributes:
        races: what was found, a line each.
    """

    def __init__(self):
        self.races: list[str] = []
        self._handler = EventHandler()
        self._numbers = itertools.count(1)
        self._threads: dict[threading.Thread, int] = {}

    def new_stream(self) -> int:
        """Return the number of a new stream."""
        number = next(self._numbers)
        self._handler._handle_stream_creation(number)
        return number

    def host(self) -> int:
        """Return the number of the calling thread as a stream."""
        thread = threading.current_thread()
        if thread not in self._threads:
            self._threads[thread] = self.new_stream()
        return self._threads[thread]

    def mark(self, stream: int) -> int:
        """Return a point behind everything in the stream so far."""
        number = next(self._numbers)
        self._handler._handle_event_creation(number)
        self._handler._handle_event_record(number, stream)
        return number

    def wait(self, stream: int, mark: int) -> None:
        """Order everything that comes later in the stream behind the point."""
        self._handler._handle_event_wait(mark, stream)

    def access(self, stream: int, name: str, *, reads: set[int] = frozenset(), writes: set[int] = frozenset()) -> None:
        """Enter accesses to memory by its address."""
        found = self._handler._handle_kernel_launch(stream, set(reads), set(writes), set(), name, defaultdict(list))
        for error in found:
            now, before = error.current_access, error.previous_access
            self.races.append(
                f"{now.operator} is {now.type} memory not ordered behind {before.operator} {before.type} it"
            )
