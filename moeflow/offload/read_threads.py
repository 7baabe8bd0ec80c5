"""Worker threads that run expert reads. Demanded reads run before prefetches. The first read starts the threads.

Knows work as a function and its arguments. Knows nothing of files or of which expert sits in which slot.
"""

import queue
import threading
import time
import traceback
from collections.abc import Iterable

from moeflow.errors import ExpertReadError, MoeflowError
from moeflow.offload.transfer import Transfer, Work


class ReadingThreads:
    """Runs the work of transfers and reports the end of each, failed or not.

    Args:
        num_threads: reads in flight.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._begin()

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

    def _start_threads(self) -> None:
        while len(self._threads) < self._num_threads:
            thread = threading.Thread(
                target=_run_queued,
                args=(self._tickets, (self._demands, self._prefetches), self._ended),
                name="moeflow-read",
                daemon=True,
            )
            thread.start()
            self._threads.append(thread)  # one more starts where an interrupt comes between

    def __del__(self) -> None:
        self._tickets.put(False)  # where an interrupt came into garbage collection, no one calls stop()

    def put(self, transfer: Transfer) -> None:
        """Queue a transfer that was given work: a prefetch behind every demand, else among the demands."""
        if len(self._threads) < self._num_threads:
            self._start_threads()
        (self._prefetches if transfer.prefetch else self._demands).put(transfer)
        self._tickets.put(True)

    def run_here(self, transfer: Transfer, work: Work) -> None:
        """Run work in the calling thread; its end is reported like any other."""
        _run(self._ended, transfer, work)

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
            # The garbage collector may run this inside a reading thread, which cannot wait for itself.
            if thread is not threading.current_thread():
                thread.join()
        self._begin()


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
            f"expert {transfer.key.expert} of MoE layer {transfer.key.layer} could not be copied to the device: {error}"
        )
        transfer.error.__cause__ = error
        traceback.clear_frames(error.__traceback__)  # they hold the slot's memory for as long as the error is kept
    transfer.seconds = time.perf_counter() - begin
    ended.put(transfer)
