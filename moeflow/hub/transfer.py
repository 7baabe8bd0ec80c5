"""The transfer: pieces of files in flight on several connections, checked and given their names in file order.

Knows threads and the order of pieces. Knows nothing of HTTP or of folders' layouts.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from moeflow.atomic_file import cannot_write
from moeflow.errors import ModelSourceError, MoeflowError
from moeflow.hub.client import CONNECTIONS
from moeflow.hub.partial_file import PIECE_BYTES, PartialFile, bytes_there, new_digest
from moeflow.hub.remote_file import ChangedError, IgnoresRangeError, RemoteFile, StoppedError
from moeflow.hub.repository import Repository, RepositoryFile
from moeflow.progress import ProgressCallback

_log = logging.getLogger(__name__)

_SHOW_EVERY_S = 0.1
_MOST_PIECES = 8  # of one request, so that its latency is a small part of it
_MOST_RESTARTS = 2  # of one file: its bytes are not what the repository lists


class _StaleError(Exception):
    """The file began again while a piece of it was on its way."""


class FileJob:
    """One file of a transfer.

    Args:
        file: as the repository lists it.
        partials: folder of the partial file.
        target: its final name.
        fresh: whether what an earlier run fetched is thrown away.
    """

    def __init__(self, file: RepositoryFile, partials: Path, target: Path, *, fresh: bool = False) -> None:
        self.file, self.partials, self.target, self.fresh = file, partials, target, fresh
        self.partial: PartialFile | None = None
        self.remote: RemoteFile | None = None
        self.tasks: deque[int] = deque()  # numbers of the pieces that nobody fetches yet
        self.times_begun = 0
        self.whole = self.complete = False
        self.lock = threading.Lock()  # holds while bytes are written, so that none of before a restart come after it


class Transfer:
    """Fetches files.

    Args:
        repository: they are of it.
        jobs: the files, in the order in which they are fetched.
        progress: called with (bytes done, bytes in all) by the thread that runs it.
        there_bytes: of files that are there: done from the beginning.
    """

    def __init__(
        self,
        repository: Repository,
        jobs: list[FileJob],
        progress: ProgressCallback | None = None,
        there_bytes: int = 0,
    ) -> None:
        self._repository, self._jobs = repository, jobs
        self._progress = progress or (lambda done, total: None)
        self._changed = threading.Condition()
        self._next_job = 0
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._done_bytes = there_bytes + sum(bytes_there(job.partials, job.file) for job in jobs if not job.fresh)
        self._total_bytes = there_bytes + sum(job.file.size for job in jobs)
        self.fetched_bytes = 0

    def run(self) -> None:
        """Fetch the files; each has its final name when this returns.

        Raises:
            ModelSourceError: one could not be fetched or written. What was fetched stays, and the next run goes on.
            StoppedError: `stop` was called before all were there.
        """
        work = [threading.Thread(target=self._guarded, args=(self._check_all,), daemon=True, name="moeflow-check")]
        for number in range(CONNECTIONS):
            fetch = threading.Thread(target=self._guarded, args=(self._fetch_all,), daemon=True, name=f"fetch-{number}")
            work.append(fetch)
        total = self._total_bytes
        try:
            for thread in work:
                thread.start()
            with self._changed:
                while not self._stop.is_set() and not self._jobs[-1].complete:
                    self._progress(self._done_bytes, total)
                    self._changed.wait(_SHOW_EVERY_S)
        finally:
            self.stop()
            for thread in work:
                if thread.ident is not None:
                    thread.join()
            for job in self._jobs:
                if job.partial is not None:
                    job.partial.close()
            self._repository.client.close()
        if self._error is not None:
            raise self._error
        if not self._jobs[-1].complete:
            raise StoppedError
        self._progress(total, total)

    def stop(self) -> None:
        """End it, from any thread; what was fetched stays."""
        self._stop.set()
        self._repository.client.abort()
        with self._changed:
            self._changed.notify_all()

    def _guarded(self, work: Callable[[], None]) -> None:
        """Run a thread's work; its first error ends the transfer."""
        try:
            work()
        except StoppedError:
            pass
        except BaseException as error:
            if isinstance(error, OSError):
                path = error.filename or self._jobs[0].target
                told: BaseException = ModelSourceError(f"{cannot_write(path, error)} What was fetched is kept.")
                told.__cause__ = error
                error = told
            with self._changed:
                if self._error is None and not (self._stop.is_set() and not isinstance(error, MoeflowError)):
                    self._error = error
            self.stop()

    # Fetching

    def _fetch_all(self) -> None:
        while (task := self._take()) is not None:
            job, pieces, times_begun = task
            try:
                self._fetch(job, pieces, times_begun)
            except _StaleError:
                pass
            except ChangedError as error:
                self._begin_again(job, times_begun, str(error))
            except IgnoresRangeError:
                self._fetch_whole(job, times_begun)

    def _take(self) -> tuple[FileJob, range, int] | None:
        """Return the next pieces in a row, of the first file that has any; None when all is done."""
        with self._changed:
            while not self._stop.is_set():
                for job in self._jobs[: self._next_job]:
                    if job.tasks:
                        return job, _next_run(job), job.times_begun
                if self._next_job < len(self._jobs):
                    self._open(self._jobs[self._next_job])
                    self._next_job += 1
                    self._changed.notify_all()
                elif self._jobs[-1].complete:
                    return None
                else:
                    self._changed.wait()
        return None

    def _open(self, job: FileJob) -> None:
        job.partials.mkdir(parents=True, exist_ok=True)
        job.partial = PartialFile(job.partials, job.file)
        job.remote = self._repository.remote(job.file, self._stop)
        if job.fresh:
            job.partial.restart()
        done = job.partial.done
        job.tasks.extend(piece for piece in range(job.partial.num_pieces) if piece not in done)

    def _fetch(self, job: FileJob, pieces: range, times_begun: int) -> None:
        """Fetch pieces by one request; each is done when its last byte is written."""
        partial, remote = job.partial, job.remote
        assert partial is not None, "a job whose tasks are taken is open"
        assert remote is not None, "a job whose tasks are taken is open"
        begin, end = partial.span(pieces[0])[0], partial.span(pieces[-1])[1]

        def take(offset: int, data: bytes) -> None:
            with job.lock:
                if job.times_begun != times_begun:
                    raise _StaleError
                try:
                    partial.write(offset, data)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(partial.path)) from error
                self._count(len(data))
                for piece in range(offset // PIECE_BYTES, pieces.stop):
                    if partial.span(piece)[1] > offset + len(data):
                        break
                    self._finish(partial, piece)

        remote.read(begin, end, take, whole=job.whole)

    def _count(self, num_bytes: int) -> None:
        with self._changed:
            self._done_bytes += num_bytes
            self.fetched_bytes += num_bytes

    def _finish(self, partial: PartialFile, piece: int) -> None:
        with self._changed:
            if piece not in partial.done:
                partial.finish(piece)
                self._changed.notify_all()

    def _fetch_whole(self, job: FileJob, times_begun: int) -> None:
        """Fetch a file in one request from now on: its server knows no ranges."""
        with self._changed:
            if job.whole or job.times_begun != times_begun:
                return
            job.whole = True
        _log.warning(
            "the server sends %s only as a whole: it is fetched from its beginning, on one connection.", job.file.name
        )
        self._restart(job, times_begun)

    def _begin_again(self, job: FileJob, times_begun: int, why: str) -> None:
        """Fetch a file anew: it changed."""
        if job.times_begun != times_begun:
            return
        if times_begun >= _MOST_RESTARTS:
            raise ModelSourceError(
                f"{why}, and so it was when it began again: this is not the file that the repository lists. Run it "
                "again later, or set HF_ENDPOINT to another mirror."
            )
        _log.warning("%s: it begins again.", why)
        self._restart(job, times_begun)

    def _restart(self, job: FileJob, times_begun: int) -> None:
        assert job.partial is not None, "a job that restarts is open"
        assert job.remote is not None, "a job that restarts is open"
        with job.lock, self._changed:
            if job.times_begun != times_begun:
                return
            job.times_begun += 1
            self._done_bytes -= sum(end - begin for begin, end in map(job.partial.span, job.partial.done))
            job.partial.restart()
            job.remote.forget()
            job.tasks = deque(range(job.partial.num_pieces))
            self._changed.notify_all()

    # Checking

    def _check_all(self) -> None:
        for job in self._jobs:
            while not self._check(job):
                pass
            with self._changed:
                job.complete = True
                self._changed.notify_all()

    def _check(self, job: FileJob) -> bool:
        """Follow a file's pieces with its digest; return whether it is complete, False where it began again."""
        with self._changed:
            while job.partial is None:
                self._wait()
            times_begun = job.times_begun
        digest = new_digest(job.file)
        for piece in range(job.partial.num_pieces):
            with self._changed:
                while piece not in job.partial.done:
                    if job.times_begun != times_begun:
                        return False
                    self._wait()
            job.partial.feed(digest, piece)
        if job.times_begun != times_begun:
            return False
        if digest.hexdigest() != (job.file.sha256 or job.file.etag):
            name = f"{job.file.name} of {self._repository.id}"
            self._begin_again(
                job, times_begun, f"{name} has checksum {digest.hexdigest()[:16]}... instead of {job.file.etag[:16]}..."
            )
            return False
        job.partial.complete(job.target)
        return True

    def _wait(self) -> None:
        if self._stop.is_set():
            raise StoppedError
        self._changed.wait()


def _next_run(job: FileJob) -> range:
    """Take pieces of a file that follow one another: all of them where it comes whole, else few, fewer near the end."""
    first = job.tasks.popleft()
    most = len(job.tasks) + 1 if job.whole else min(_MOST_PIECES, len(job.tasks) // (4 * CONNECTIONS) + 1)
    end = first + 1
    while job.tasks and job.tasks[0] == end and end - first < most:
        job.tasks.popleft()
        end += 1
    return range(first, end)
