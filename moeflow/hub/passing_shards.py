"""Shards of a repository that are on the disk only while they are needed; those of the next turn come meanwhile.

Knows files, turns and room on the disk. Knows nothing of what shards hold behind their headers.
"""

import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from moeflow.checkpoint.gguf.names import list_models
from moeflow.checkpoint.headers import INDEX_FILE, SINGLE_FILE, Checkpoint
from moeflow.checkpoint.reading.file_stamp import FileStamp
from moeflow.errors import ModelSourceError
from moeflow.formatting import format_bytes
from moeflow.hub.download import SPARE_BYTES, complete
from moeflow.hub.headers import head_file, remote_checkpoint
from moeflow.hub.partial_file import journal_of
from moeflow.hub.repository import Repository, RepositoryFile
from moeflow.hub.selection import refuse_others, select_files
from moeflow.hub.stores import CacheStore
from moeflow.hub.transfer import FileJob, Transfer
from moeflow.progress import ProgressCallback

_log = logging.getLogger(__name__)

_SHOW_EVERY_S = 0.1
_NOT_HERE = Path(os.devnull)  # in place of a shard that a turn does not need: a read of it fails


class PassingShards:
    """A repository's shards, for a writer that takes them turn by turn (`checkpoint.writing.shards.Shards`).

    Used in a `with`: its end stops what is being fetched. What came stays for the next run, until `finish`.

    Args:
        repository: on the hub.
        work: a folder of its own.
        progress: called with (bytes of shards that came, bytes of all shards), by the thread that takes them.

    Attributes:
        names: what tells the shards from others; known when the headers are.
        fetched_bytes: that came over the network in this run, headers not counted.
        planned: whether turns are known and there is room for them.
    """

    def __init__(self, repository: Repository, work: Path, progress: ProgressCallback | None = None) -> None:
        self.names: list[list[object]] = []
        self.stamps: list[FileStamp] | None = None  # files come and go
        self.fetched_bytes = 0
        self.planned = False
        self._repository, self._work = repository, work
        self._progress = progress or (lambda done, total: None)
        self._store, self._heads = CacheStore(repository.id, work), work / "heads"
        self._shards: list[RepositoryFile] = []
        self._turns: list[frozenset[int]] = []
        self._pending: set[int] = set()  # not whole on the disk, and needed
        self._one_ahead = True
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="moeflow-shards")
        self._transfer: Transfer | None = None
        self._running: tuple[int, frozenset[int], Future[None]] | None = None  # a turn, and what comes for it
        self._came_bytes = 0  # of the transfer that runs

    def __enter__(self) -> "PassingShards":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop what is being fetched."""
        if self._transfer is not None:
            self._transfer.stop()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def open(self) -> Checkpoint:
        """Fetch everything but the shards, and their headers.

        Returns:
            The checkpoint's tables; its folder holds everything beside the shards.

        Raises:
            ModelSourceError: the repository has no safetensors shards or cannot be had; the folder is another's.
            CheckpointError: a header is none.
            OSError: the disk cannot be written.
        """
        repository = self._repository
        self._refuse_another_folder()
        named = {file.name: file for file in repository.wanted_files}
        self._refuse_other_weights(set(named))
        small = select_files(repository, None, weights=False)
        self._clear({file.etag for file in named.values()})
        self.fetched_bytes += complete(self._store, repository, small)
        folder = self._store.finish(small, repository.commit, repository.revision)
        checkpoint = remote_checkpoint(repository, folder, self._heads)
        self._shards = [named[file.relative_to(folder).as_posix()] for file in checkpoint.files]
        self.names = [[file.name, file.size, file.etag] for file in self._shards]
        return checkpoint

    def plan(self, turns: list[frozenset[int]], folder: Path, more_bytes: int) -> None:
        """Learn which shards each turn needs, and drop what no turn does.

        Args:
            turns: numbers of shards, in the order of turns.
            folder: that is written.
            more_bytes: that will be written there.

        Raises:
            ModelSourceError: there is no room for these and for the shards that are needed at once.
        """
        self._turns = turns
        needed = frozenset[int]().union(*turns)
        self._unlink(set(range(len(self._shards))) - needed, needed)
        self._pending = {number for number in needed if not self._is_whole(number)}
        sizes, there = [file.size for file in self._shards], [self._bytes_there(n) for n in range(len(self._shards))]
        free = shutil.disk_usage(folder).free + sum(there)
        least_held = most_held(turns, sizes, there, one_ahead=False)
        if more_bytes + least_held + SPARE_BYTES > free:
            raise ModelSourceError(
                f"{self._repository.what} needs {format_bytes(more_bytes)} more in {folder.parent} for what is "
                f"written, and {format_bytes(least_held + SPARE_BYTES)} for the shards that are there at one time; "
                f"{format_bytes(free)} are free. Make room, or give a folder on another disk."
            )
        held = most_held(turns, sizes, there, one_ahead=True)
        self._one_ahead = more_bytes + held + SPARE_BYTES <= free
        self.planned = True

    def take(self, turn: int) -> list[Path]:
        """Return the shards' files, by number; those that the turn does not need are not there.

        Raises:
            ModelSourceError: one cannot be fetched, or has another header than before.
        """
        if self._running is None or self._running[0] != turn:
            self._begin(turn)
        self._wait()
        for number in self._turns[turn]:
            self._check_head(self._shards[number])
        if self._one_ahead and turn + 1 < len(self._turns):
            self._begin(turn + 1)
        needed = self._turns[turn]
        return [self._whole(number) if number in needed else _NOT_HERE for number in range(len(self._shards))]

    def drop(self, turn: int) -> None:
        """Remove the shards that no later turn needs."""
        later = frozenset[int]().union(*self._turns[turn + 1 :])
        self._unlink(self._turns[turn] - later, later)

    def finish(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._work)

    def tell(self) -> None:
        """Call the progress, from when it is known what comes."""
        if not self.planned:
            return
        total = sum(file.size for file in self._shards)
        left = sum(self._shards[number].size for number in self._pending)
        self._progress(min(total, total - left + self._came_bytes), total)

    # Fetching

    def _begin(self, turn: int) -> None:
        """Begin to fetch what a turn needs and is not there."""
        missing = frozenset(number for number in self._turns[turn] if not self._is_whole(number))
        if not missing:
            return
        once = {self._whole(number): self._shards[number] for number in sorted(missing)}
        jobs = [FileJob(file, self._store.partials, target) for target, file in once.items()]
        self._transfer = Transfer(self._repository, jobs, self._note)
        self._running = (turn, missing, self._thread.submit(self._transfer.run))

    def _note(self, done: int, total: int) -> None:
        self._came_bytes = done

    def _wait(self) -> None:
        """Wait until what is being fetched is there."""
        if self._running is None:
            return
        assert self._transfer is not None, "what runs is a transfer"
        _, missing, future = self._running
        while not wait([future], _SHOW_EVERY_S).done:
            self.tell()
        future.result()
        self._running = None
        self.fetched_bytes += self._transfer.fetched_bytes
        self._pending -= missing
        self._came_bytes = 0
        self.tell()

    def _check_head(self, file: RepositoryFile) -> None:
        """Hold the header that was read on its own against the shard, whose checksum is right."""
        path = head_file(self._heads, file)
        head = path.read_bytes()
        with open(self._store.target(file), "rb") as whole:
            if whole.read(len(head)) == head:
                return
        path.unlink()
        raise ModelSourceError(
            f"the header of {file.name} of {self._repository.id} is another than the one that the server sent before. "
            "Run it again, or set HF_ENDPOINT to another mirror."
        )

    # Files

    def _whole(self, number: int) -> Path:
        return self._store.target(self._shards[number])

    def _is_whole(self, number: int) -> bool:
        """Whether a shard is there: it gets this name when its checksum is right."""
        return self._whole(number).is_file()

    def _bytes_there(self, number: int) -> int:
        with suppress(FileNotFoundError):
            return self._whole(number).stat().st_size
        with suppress(FileNotFoundError):
            return _partial(self._whole(number)).stat().st_blocks * 512
        return 0

    def _unlink(self, numbers: "set[int] | frozenset[int]", needed: frozenset[int]) -> None:
        """Remove shards, but for those whose bytes are those of one that is needed."""
        stay = {self._whole(number) for number in needed}
        for path in {self._whole(number) for number in numbers} - stay:
            for file in (path, _partial(path), journal_of(_partial(path))):
                file.unlink(missing_ok=True)

    def _clear(self, etags: set[str]) -> None:
        """Remove what earlier runs fetched of other contents."""
        snapshots = self._store.folder / "snapshots"
        for folder in (self._store.partials, self._heads):
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.name.partition(".")[0] not in etags:
                    path.unlink()
        for folder in snapshots.iterdir() if snapshots.is_dir() else ():
            if folder.name != self._repository.commit:
                _log.warning(
                    "%s is at another commit than when it was begun: what changed begins again.", self._repository.what
                )
                shutil.rmtree(folder)

    def _refuse_another_folder(self) -> None:
        """Refuse a folder that is not of a run for this repository: it is removed in the end."""
        own = {self._store.folder.name, self._heads.name, ".locks"}
        if self._work.exists() and not (self._work.is_dir() and {path.name for path in self._work.iterdir()} <= own):
            raise ModelSourceError(
                f"{self._work} is in the way: a download of {self._repository.id} did not make it. Remove it, or give "
                "another folder to write."
            )

    def _refuse_other_weights(self, names: set[str]) -> None:
        if packed := sorted(name for name in names if name.endswith(".moeflow")):
            raise ModelSourceError(
                f"{self._repository.what} has its experts in one packed file ({packed[0]}), which would be there from "
                "the first to the last. Fetch it, then quantise it: moeflow download, moeflow quantize."
            )
        if names & {SINGLE_FILE, INDEX_FILE}:
            return
        what, sizes = self._repository.what, {file.name: file.size for file in self._repository.files}
        if found := list_models(sizes):
            raise ModelSourceError(
                f"{what} has GGUF files alone, whose weights were rounded before: they are not quantised again. Fetch "
                f"one as it is (moeflow download {self._repository.id} --gguf-file NAME, of {found}), or quantise the "
                "model's safetensors."
            )
        refuse_others(what, sizes)


def most_held(turns: list[frozenset[int]], sizes: list[int], there: list[int], *, one_ahead: bool) -> int:
    """Return the most bytes that shards take on the disk at once.

    Args:
        turns: numbers of the shards that each turn needs; one is held from the first turn that needs it to the last.
        sizes: [num_shards], bytes.
        there: [num_shards], bytes of each that are on the disk before the first turn, and stay until its last.
        one_ahead: whether the shards of the next turn come during a turn.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for turn, numbers in enumerate(turns):
        for number in numbers:
            first.setdefault(number, turn)
            last[number] = turn
    most = sum(there)
    for turn in range(len(turns)):
        held = 0
        for number, begin in first.items():
            if begin > turn + one_ahead:
                held += there[number]
            elif last[number] >= turn:
                held += sizes[number]
        most = max(most, held)
    return most


def _partial(whole: Path) -> Path:
    return whole.with_name(f"{whole.name}.partial")
