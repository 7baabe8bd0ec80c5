"""Worker threads that run expert reads. Demanded reads run before prefetches. The first read starts the threads.

A thread that reads an expert may share its parts with helpers. Knows work as a function and its arguments. Knows
nothing of files or of which expert sits in which slot.
"""

import contextlib
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable

from moeflow.checkpoint.reading.parts import Part
from moeflow.errors import ExpertReadError, MoeflowError
from moeflow.offload.copies.transfer import Transfer, Work

_HELPERS = 3  # for each thread: with four threads, 16 reads may be in flight


class ReadingThreads:
    """Runs the work of transfers and reports the end of each, failed or not.

    Args:
        num_threads: experts that are read at a time.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._begin()

    @property
    def has_room(self) -> bool:
        """Whether no transfer waits for a thread."""
        return self._tickets.empty()

    def after_fork(self, lost: Iterable[Transfer]) -> None:
        """Begin anew in the child of a fork, and report as failed what the threads there had to do."""
        self._begin()
        for transfer in lost:
            transfer.take_work()
            transfer.error = ExpertReadError(
                f"expert {transfer.key.expert} of MoE layer {transfer.key.layer} was on its way when the process was "
                "forked. The model stays usable in both processes: call again."
            )
            self._ended.put(transfer)

    def _begin(self) -> None:
        # Not a ThreadPoolExecutor: an interrupt inside its submit() leaves a lock held forever.
        # One ticket for each entry of the two queues; a thread with a ticket looks among the demands first.
        self._tickets: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._demands: queue.SimpleQueue[Transfer] = queue.SimpleQueue()
        self._prefetches: queue.SimpleQueue[Transfer] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Transfer] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._shared: queue.SimpleQueue[_Shared | None] = queue.SimpleQueue()
        self._helpers: list[threading.Thread] = []
        self._to_start = [None] * (_HELPERS * self._num_threads)

    def _start_threads(self) -> None:
        work = (self._tickets, (self._demands, self._prefetches), self._ended)
        while len(self._threads) < self._num_threads:
            thread = threading.Thread(target=_run_queued, args=work, name="moeflow-read", daemon=True)
            thread.start()
            self._threads.append(thread)  # one more starts where an interrupt comes between

    def _start_helper(self) -> None:
        """Start one more helper if there may be one; several threads may call this at once."""
        with contextlib.suppress(IndexError, RuntimeError):  # all have started, or the system gives no more threads
            self._to_start.pop()
            helper = threading.Thread(target=_help, args=(self._shared,), name="moeflow-read-part", daemon=True)
            self._helpers.append(helper)
            helper.start()

    def __del__(self) -> None:
        self._tickets.put(False)  # where an interrupt came into garbage collection, no one calls stop()
        self._shared.put(None)

    def put(self, transfer: Transfer) -> None:
        """Queue a transfer that was given work: a prefetch behind every demand, else among the demands."""
        if len(self._threads) < self._num_threads:
            self._start_threads()
        (self._prefetches if transfer.prefetch else self._demands).put(transfer)
        self._tickets.put(True)

    def run_here(self, transfer: Transfer, work: Work) -> None:
        """Run work in the calling thread; its end is reported like any other."""
        _run(self._ended, transfer, work)

    def share(self, run: Callable[[Part], None], parts: list[Part]) -> Generator[Part, None, None]:
        """Run a function on the parts of one read, in the calling thread and in helpers; yield each that is done.

        What it raises is raised here. However this ends, no helper works on a part any more.
        """
        shared, left = _Shared(run, parts), len(parts)
        for _ in parts[1:]:
            self._shared.put(shared)
            self._start_helper()
        try:
            while left:
                part, error = shared.next()
                left -= 1
                if error is not None:
                    raise error
                yield part
        finally:
            for _ in range(left - shared.drop()):
                shared.ended.get()

    def wait(self) -> Transfer:
        """Block until a transfer has ended, and return it; its `error` says whether it failed."""
        return self._ended.get()

    def poll(self) -> Transfer | None:
        """Return a transfer that has ended, or None."""
        try:
            return self._ended.get_nowait()
        except queue.Empty:
            return None

    def stop(self) -> None:
        """Let running work end, stop the threads, and forget the queues and reports; the next transfer starts anew.

        After an interrupt in here, a second call finishes.
        """
        self._tickets.put(False)
        for thread in self._threads:
            thread.join()
        self._shared.put(None)  # only now: what is read until then may be shared
        for thread in self._helpers:
            if thread.ident is not None:  # else it could not be started
                thread.join()
        self._begin()

    @property
    def here(self) -> bool:
        """Whether the calling thread is one of these."""
        return threading.current_thread() in (*self._threads, *self._helpers)


class _Shared:
    """The parts of one read, which several threads run.

    Attributes:
        ended: those that helpers have run, with the error of each, or None.
    """

    def __init__(self, run: Callable[[Part], None], parts: list[Part]) -> None:
        self._run, self._waiting = run, deque(parts)
        self.ended: queue.SimpleQueue[tuple[Part, BaseException | None]] = queue.SimpleQueue()

    def next(self) -> tuple[Part, BaseException | None]:
        """Return a part that has ended, with its error: a helper's, or one that is run here."""
        try:
            return self.ended.get_nowait()
        except queue.Empty:
            return self._run_one() or self.ended.get()

    def help(self) -> None:
        """Run parts until none waits."""
        while (ended := self._run_one()) is not None:
            self.ended.put(ended)

    def drop(self) -> int:
        """Let no part begin any more; return how many had not."""
        dropped = 0
        while self._take() is not None:
            dropped += 1
        return dropped

    def _take(self) -> Part | None:
        try:
            return self._waiting.popleft()
        except IndexError:
            return None

    def _run_one(self) -> tuple[Part, BaseException | None] | None:
        part = self._take()
        if part is None:
            return None
        try:
            self._run(part)
        except BaseException as error:  # without a report its read would wait forever
            return part, error
        return part, None


def _help(shared: "queue.SimpleQueue[_Shared | None]") -> None:
    """Run parts of reads until there is a None: the body of a helper."""
    while (found := shared.get()) is not None:
        found.help()
        del found  # while this thread waits, it holds nothing of the runtime's
    shared.put(None)  # for the next thread


def _run_queued(
    tickets: queue.SimpleQueue[bool],
    queues: tuple[queue.SimpleQueue[Transfer], ...],
    ended: queue.SimpleQueue[Transfer],
) -> None:
    """Run queued work, demands first, until a ticket is False: the body of a reading thread."""
    while tickets.get():
        for waiting in queues:
            try:
                transfer = waiting.get_nowait()
                break
            except queue.Empty:
                continue
        work = transfer.take_work()
        if work is not None:
            _run(ended, transfer, work)
        del transfer, work  # while this thread waits, it holds nothing of the runtime's
    tickets.put(False)  # for the next thread


def _run(ended: queue.SimpleQueue[Transfer], transfer: Transfer, work: Work) -> None:
    """Run one read and always report its end: a missing report would leave its layer waiting forever."""
    function, *arguments = work
    begin = time.perf_counter()
    try:
        function(*arguments)
    except MoeflowError as error:
        transfer.error = error
    except Exception as error:
        transfer.error = ExpertReadError(
            f"expert {transfer.key.expert} of MoE layer {transfer.key.layer} could not be copied to the device: "
            + str(error).partition("\n")[0]
        )
        transfer.error.__cause__ = error
        traceback.clear_frames(error.__traceback__)  # they hold the slot's memory for as long as the error is kept
    transfer.seconds = time.perf_counter() - begin
    ended.put(transfer)
