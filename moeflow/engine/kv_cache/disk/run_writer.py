"""A thread that writes runs to their files while they are still in memory, so that nobody waits for the disk.

Knows a folder of run files and a queue. Knows nothing of trees.
"""

import logging
import queue
import threading

from moeflow.engine.kv_cache.disk.run_file import CopiedPiece, LeavingRun, file_bytes, write_run
from moeflow.engine.kv_cache.disk.run_folder import RunFolder, name_of

_log = logging.getLogger(__name__)


class RunWriter:
    """Writes what is put into its queue, in this order, as long as it is there.

    Args:
        folder: of the files.
        copying: as of `CopiedPiece`.

    Attributes:
        waiting: runs to be written; None ends the thread.
        num_written: tokens that were written.
        num_missed: tokens that left before they were written.
        failed: whether the disk refused a file; nothing is written any more.
    """

    def __init__(self, folder: RunFolder, copying: threading.Lock) -> None:
        self.waiting: queue.Queue[LeavingRun | None] = queue.Queue()
        self.num_written = self.num_missed = 0
        self.failed = False
        self._folder, self._copied = folder, CopiedPiece(copying)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moeflow-kept", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, with nothing half-written, and give the folder back."""
        self._stopping.set()
        self.waiting.put(None)
        self._thread.join()
        self._folder.close()

    def _run(self) -> None:
        while (run := self.waiting.get()) is not None:
            try:
                self._write(run)
            except (OSError, RuntimeError) as error:
                self.failed = True
                _log.warning("%s: %s. No more kept prefixes are written there.", self._folder.path, error)
            finally:
                run.written.set()
                self.waiting.task_done()
            del run

    def _write(self, run: LeavingRun) -> None:
        folder, row = self._folder, run.row
        if not self._goes_on() or folder.entry_of(row) is not None:
            return
        if not folder.make_room(file_bytes(folder.model, row, folder.layout)):
            return
        if write_run(folder.path / name_of(row), folder.model, run, folder.layout, self._copied, self._goes_on):
            folder.add(row)
            self.num_written += len(row.tokens)
        elif self._goes_on():
            self.num_missed += len(row.tokens)

    def _goes_on(self) -> bool:
        return not self._stopping.is_set() and not self.failed
