"""A folder of one model's run files: an index in memory, a limit of bytes, and a lock that keeps other engines out.

Knows runs, files and the order of their use. Knows nothing of trees or budgets. Two threads may use one.
"""

import hashlib
import logging
import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moeflow.atomic_file import cannot_write
from moeflow.engine.kv_cache.disk.run_file import RunRow, data_bytes, file_bytes, read_row, read_run
from moeflow.engine.kv_cache.kept.kept_runs import Run
from moeflow.engine.kv_cache.kept.run_tensors import Layout
from moeflow.engine.kv_cache.windows import Stretch, last_place, missing
from moeflow.errors import ConfigError, MoeflowError
from moeflow.file_lock import lock_file, unlock_file

_log = logging.getLogger(__name__)
_SUFFIX = ".run"
_LOCK = "lock"
_TOKEN_BYTES = 8


class RunEntry(NamedTuple):
    """A file of the index.

    Args:
        file: its name.
        scaling: of the run's keys.
        tokens: from the first one of the sequence to the run's last, `packed`.
        begin: tokens before the run.
        parts: what is kept in layers with a window.
        file_bytes: of the file.
        data_bytes: of its tensors.
    """

    file: str
    scaling: Hashable
    tokens: bytes
    begin: int
    parts: list[Stretch]
    file_bytes: int
    data_bytes: int

    @property
    def end(self) -> int:
        """Tokens up to the end of the run."""
        return len(self.tokens) // _TOKEN_BYTES

    def covers(self, scaling: Hashable, tokens: bytes, begin: int, parts: list[Stretch]) -> bool:
        """Return whether all of a run is in the file, with what is kept of it in layers with a window."""
        if self.begin > begin or self.scaling != scaling or not self.tokens.startswith(tokens):
            return False
        return not any(missing(self.parts, *part) for part in parts)

    def reach(self, tokens: bytes, place: int) -> int:
        """Return up to where a sequence goes along with the run, behind a place that is in it; 0 for no farther."""
        if not self.begin <= place < self.end or self.tokens[: place * _TOKEN_BYTES] != tokens[: place * _TOKEN_BYTES]:
            return 0
        one, other = (np.frombuffer(some, np.int64)[place:] for some in (self.tokens, tokens))
        shorter = min(len(one), len(other))
        parted = np.flatnonzero(one[:shorter] != other[:shorter])
        return place + (int(parted[0]) if len(parted) else shorter)


class Link(NamedTuple):
    """A file with which a sequence goes on.

    Args:
        entry: the file.
        begin: where it goes on, inside the run or where that begins.
        reach: up to where both have the same tokens.
        place: the last one, at most this, behind which another can go on with what is kept up to there.
        stretches: what it keeps between `begin` and `reach` in layers with a window.
    """

    entry: RunEntry
    begin: int
    reach: int
    place: int
    stretches: list[Stretch]


class RunFolder:
    """The files of one model.

    Args:
        folder: made where it is not there; it has a folder of each model.
        model: its fingerprint.
        layout: the layers that keep keys and values, by their number.
        most_bytes: of all files together.

    Raises:
        ConfigError: an engine of this or another process has this model's folder.
        MoeflowError: the folder cannot be made or written to.

    Attributes:
        num_bytes: of all files.
        num_removed: files that were removed since the start and are in no other.
    """

    def __init__(self, folder: Path, model: str, layout: Layout, most_bytes: int) -> None:
        self.path, self.model, self.layout = folder / model, model, layout
        self.num_bytes = self.num_removed = 0
        self._window = max((shape.window for shape in layout.values()), default=0)
        self._most_bytes = most_bytes
        self._lock = threading.RLock()
        self._entries: OrderedDict[str, RunEntry] = OrderedDict()  # least recently used first
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)  # it tells what was talked about
            self._descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        except OSError as error:
            raise MoeflowError(cannot_write(self.path, error)) from error
        if not lock_file(self._descriptor, self.path / _LOCK):
            os.close(self._descriptor)
            raise ConfigError(
                f"another engine keeps its prefixes in {self.path}. Close it, or give another kept_folder."
            )
        for file in self.path.glob(f".*{_SUFFIX}.*"):  # a part and its lock, of a process that was killed
            file.unlink(missing_ok=True)
        for file in sorted(self.path.glob(f"*{_SUFFIX}"), key=lambda one: (one.stat().st_mtime_ns, one.name)):
            try:
                self._put(file.name, read_row(file, model, layout))
            except (OSError, ValueError) as error:
                self._leave_out(file, error)
        self.make_room(0)

    def __len__(self) -> int:
        return len(self._entries)

    def entry_of(self, row: RunRow) -> RunEntry | None:
        """Return a file that has all of a run, with what is kept of it in layers with a window; None for none."""
        run = row.scaling, packed(row.before + row.tokens), len(row.before), row.parts
        with self._lock:
            return next((entry for entry in self._entries.values() if entry.covers(*run)), None)

    def chain(self, scaling: Hashable, tokens: list[int], place: int, stretches: list[Stretch]) -> list[Link]:
        """Return the files with which a sequence goes on, one behind the other.

        Args:
            scaling: of the sequence's keys.
            tokens: the sequence.
            place: where the first one goes on, inside its run or where it begins.
            stretches: what there is before this place in layers with a window.
        """
        found: list[Link] = []
        whole = packed(tokens)
        with self._lock:
            entries = [entry for entry in self._entries.values() if entry.scaling == scaling]
            while links := [link for one in entries if (link := self._link(one, whole, place, stretches)) is not None]:
                best = max(links, key=lambda link: (link.place, link.reach, -link.entry.file_bytes))
                found.append(best)
                stretches = stretches + best.stretches
                place = best.reach
            for link in reversed(found):  # what leads to a run leaves after it
                self._entries.move_to_end(link.entry.file)
        return found

    def _link(self, entry: RunEntry, tokens: bytes, place: int, stretches: list[Stretch]) -> Link | None:
        """Return how a sequence goes on with a file from a place on; None where it does not."""
        reach = entry.reach(tokens, place)
        if reach <= place:
            return None
        own = [(max(begin, place), min(end, reach)) for begin, end in entry.parts if begin < reach and end > place]
        last = last_place(stretches + own, self._window, reach) if self._window else reach
        return Link(entry, place, reach, last, own)

    def read(self, entry: RunEntry) -> Run | None:
        """Read a run and note its use; None where it has gone, or with a warning where it is damaged.

        Raises:
            RuntimeError: there is no memory.
        """
        file = self.path / entry.file
        try:
            run = read_run(file, self.model, self.layout)
            os.utime(file)
            return run
        except (OSError, ValueError) as error:
            with self._lock:
                if entry.file in self._entries:  # else it has just left for a newer one
                    self._forget(entry)
                    self.num_removed += 1
                    self._leave_out(file, error)
        return None

    def make_room(self, num_bytes: int) -> bool:
        """Remove the files that were not used for the longest time until there is room; return whether there can be."""
        if num_bytes > self._most_bytes:
            return False
        with self._lock:
            while self.num_bytes + num_bytes > self._most_bytes:
                self._remove(next(iter(self._entries.values())))
                self.num_removed += 1
        return True

    def add(self, row: RunRow) -> None:
        """Take in a file that was written, in place of those whose runs are in it."""
        with self._lock:
            name = name_of(row)
            self._put(name, row)
            covers = self._entries[name].covers
            for entry in list(self._entries.values()):
                if entry.file != name and covers(entry.scaling, entry.tokens, entry.begin, entry.parts):
                    self._remove(entry)

    def close(self) -> None:
        """Let other engines have the folder."""
        unlock_file(self._descriptor)

    def abandon(self) -> None:
        """Leave the folder to the parent, in the child of a fork."""
        os.close(self._descriptor)

    def _put(self, file: str, row: RunRow) -> None:
        num_bytes, tokens = file_bytes(self.model, row, self.layout), packed(row.before + row.tokens)
        own = data_bytes(row, self.layout)
        self._entries[file] = RunEntry(file, row.scaling, tokens, len(row.before), row.parts, num_bytes, own)
        self.num_bytes += num_bytes

    def _remove(self, entry: RunEntry) -> None:
        self._forget(entry)
        with suppress(OSError):
            (self.path / entry.file).unlink()

    def _forget(self, entry: RunEntry) -> None:
        del self._entries[entry.file]
        self.num_bytes -= entry.file_bytes

    def _leave_out(self, file: Path, error: Exception) -> None:
        _log.warning("%s is not used and removed: %s.", file, error)
        with suppress(OSError):
            file.unlink()


def packed(tokens: list[int]) -> bytes:
    """Return tokens in bytes that are quickly compared."""
    return array("q", tokens).tobytes()


def name_of(row: RunRow) -> str:
    """Return the name of a run's file."""
    return hashlib.sha256(repr(tuple(row)).encode()).hexdigest()[:32] + _SUFFIX
