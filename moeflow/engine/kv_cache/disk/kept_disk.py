"""Kept prefixes on a disk: what may soon leave the tree is written ahead, and what left it is read back.

Knows the tree, room, speeds and a folder of files. Knows nothing of sequences or of who waits.
"""

import threading
import time
import weakref
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any

from moeflow.engine.kv_cache.disk.run_file import LeavingRun
from moeflow.engine.kv_cache.disk.run_folder import Link, RunEntry, RunFolder
from moeflow.engine.kv_cache.disk.run_writer import RunWriter
from moeflow.engine.kv_cache.kept.kept_runs import Node, Run, parts_between
from moeflow.engine.kv_cache.kept.prefix_tree import PrefixTree
from moeflow.engine.kv_cache.kept.run_tensors import Layout, plain_layers, windowed_layers
from moeflow.engine.kv_cache.preemption import MeasuredSpeeds
from moeflow.engine.kv_cache.room import Room
from moeflow.engine.sequence import MIN_SHARED_TOKENS
from moeflow.errors import ConfigError
from moeflow.fork import tell_of_forks
from moeflow.memory_size import MemorySize, parse_bytes
from moeflow.policy.kept_reading import num_worth_reading


class KeptDisk:
    """What is kept of one model's sequences on a disk. In the child of a fork it does nothing.

    Args:
        files: those of the model.
        kept: the tree of which runs are written and into which they are read.
        room: that of the tree.
        layout: the layers that keep keys and values, by their number.
        most_kept_bytes: of the tree.

    Attributes:
        writer: what writes.
    """

    def __init__(self, files: RunFolder, kept: PrefixTree, room: Room, layout: Layout, most_kept_bytes: int) -> None:
        self._folder, self._most_kept_bytes = files, most_kept_bytes
        self.writer = RunWriter(self._folder, room.copying)
        self._kept, self._room, self._layout = kept, room, layout
        self._plain_bytes = sum(shape.position_bytes for shape in plain_layers(layout).values())
        self._window_bytes = sum(shape.position_bytes for shape in windowed_layers(layout).values())
        self._num_read = 0
        self._is_open = True
        # What was given to the writer, or is on the disk: as it was then, and how many files had been removed.
        self._known: weakref.WeakKeyDictionary[Node, tuple[int, ...]] = weakref.WeakKeyDictionary()
        self._served: weakref.WeakSet[Any] = weakref.WeakSet()
        self._ending = weakref.finalize(self, self.writer.close)
        tell_of_forks(self)

    def write_ahead(self) -> None:
        """Let runs be written that are not on the disk, those that leave first before others.

        They wait until half of the budget is taken, where nobody shares it.
        """
        if not self._is_open or self.writer.failed:
            return
        most = min(self._room.budget_bytes, self._most_kept_bytes)
        if not self._room.is_shared and self._room.used_bytes + self._kept.num_bytes <= most // 2:
            return
        for node in self._kept.nodes():
            state = node.begin, node.end, len(node.parts), self._folder.num_removed
            if self._known.get(node) != state:
                self._known[node] = state
                run = LeavingRun.of(self._kept.run_of(node))
                if self._folder.entry_of(run.row) is None:
                    node.written = run.written
                    self.writer.waiting.put(run)

    def bring_back(
        self,
        asker: object,
        scaling: Hashable,
        tokens: list[int],
        needed: tuple[int, int],
        speeds: MeasuredSpeeds,
    ) -> None:
        """Read what follows the tree's end along these tokens, where that saves time and a slot will have room then.

        Args:
            asker: who wants it: nothing is read for it twice.
            scaling: of its keys.
            tokens: that it may have from others.
            needed: bytes and positions of the slot that it gets.
            speeds: of computing and of reading, which is measured.
        """
        if not self._is_open or asker in self._served:
            return
        place = self._kept.common(scaling, tokens)
        chain = self._folder.chain(scaling, tokens, place, self._kept.stretches(scaling, tokens))
        if not chain:
            return
        sizes, places = [link.entry.file_bytes for link in chain], [link.place for link in chain]
        here = self._kept.longest(scaling, tokens)
        count = num_worth_reading(sizes, places, here, read_s=speeds.read_s, prefill_s=speeds.prefill_s)
        if not count or places[count - 1] < MIN_SHARED_TOKENS:
            return
        if not self._will_have_room(chain[:count], scaling, tokens, needed):
            return
        self._served.add(asker)
        for link in chain[:count]:
            if not self._read(link, scaling, tokens, speeds):
                return

    def _will_have_room(self, chain: list[Link], scaling: Hashable, tokens: list[int], needed: tuple[int, int]) -> bool:
        """Return whether a slot has room beside what is read for it, and what that is behind; the last run may move."""
        kept = [self._kept_bytes(link) for link in chain]
        entry, moving = chain[-1].entry, 0
        if chain[-1].place == entry.end:  # as `Node.movable_bytes`
            largest = max((end - begin for begin, end in entry.parts), default=0)
            moving = max(0, kept[-1] - self._of_window(entry) - largest * self._window_bytes)
        num_bytes = needed[0] + self._kept.path_bytes(scaling, tokens) + sum(kept) - moving
        return self._room.has(num_bytes, max(needed[1], *(link.entry.end - link.entry.begin for link in chain)))

    def _kept_bytes(self, link: Link) -> int:
        """Return the bytes of a run from a place on, or a little more."""
        return link.entry.data_bytes - self._plain_bytes * (link.begin - link.entry.begin)

    def _of_window(self, entry: RunEntry) -> int:
        return entry.data_bytes - self._plain_bytes * (entry.end - entry.begin)

    def _read(self, link: Link, scaling: Hashable, tokens: list[int], speeds: MeasuredSpeeds) -> bool:
        """Read a run into the tree from a place on; return whether it is there."""
        entry = link.entry
        taken = entry.data_bytes + self._kept.bytes_to_part(scaling, tokens[: link.begin])
        if link.begin > entry.begin:
            taken += self._of_window(entry)  # is copied
        num_positions = entry.end - entry.begin
        if not self._room.has(self._kept.path_bytes(scaling, tokens) + taken, num_positions):
            return False  # what leads to it would leave for it
        done = False
        if self._room.make(taken, num_positions) and self._room.hold(taken, num_positions):
            with suppress(RuntimeError):  # the machine has no memory: it is computed again
                done = self._restore(link, scaling, tokens, speeds)
        self._room.settle()
        self._kept.longest(scaling, tokens)  # what was read leaves last
        return done

    def _restore(self, link: Link, scaling: Hashable, tokens: list[int], speeds: MeasuredSpeeds) -> bool:
        """Read a run into the tree, which has room for it; else nothing of it is left."""
        begin = time.perf_counter()
        run = self._folder.read(link.entry)
        if run is None:
            return False
        speeds.saw_read(link.entry.file_bytes, time.perf_counter() - begin)
        run = _behind(run, link.begin)
        self._kept.part(scaling, tokens[: link.begin])
        if not self._kept.restore(run):
            return False
        self._num_read += len(run.tokens)
        return True

    def stats(self) -> dict[str, int] | None:
        """Return files and bytes, and tokens written, missed (they left before) and read; None where it is closed."""
        if not self._is_open:
            return None
        return {
            "files": len(self._folder),
            "bytes": self._folder.num_bytes,
            "removed_files": self._folder.num_removed,
            "written_tokens": self.writer.num_written,
            "missed_tokens": self.writer.num_missed,
            "read_tokens": self._num_read,
        }

    def close(self) -> None:
        """End the thread; the files stay."""
        self._is_open = False
        self._ending()

    def after_fork(self) -> None:
        """Leave the files to the parent, whose thread did not come along."""
        if self._ending.detach() is not None:
            self._is_open = False
            self._room.copying = threading.Lock()  # that thread may have had it
            for node in list(self._known):
                node.written = None
            self._folder.abandon()


DiskMaker = Callable[[PrefixTree, Room, Layout, int], KeptDisk]


def disk_for(folder: str | Path, most: MemorySize, model: Callable[[], str]) -> DiskMaker:
    """Return what makes the disk of a memory.

    Args:
        folder: of all models.
        most: bytes of the files of one.
        model: tells its fingerprint.

    Raises:
        ConfigError: `most` is no size.
    """
    most_bytes, path = parse_bytes(most, name="kept_disk"), Path(folder).expanduser()

    def make(kept: PrefixTree, room: Room, layout: Layout, most_kept_bytes: int) -> KeptDisk:
        return KeptDisk(RunFolder(path, model(), layout, most_bytes), kept, room, layout, most_kept_bytes)

    return make


def check_keeps(keeps: bool, policy: str | None) -> None:
    """Refuse a disk where nothing is kept.

    Args:
        keeps: whether anything is.
        policy: by which sequences forget or see a part; None for none.

    Raises:
        ConfigError: says why nothing is kept.
    """
    if keeps:
        return
    if policy is None:
        raise ConfigError("kept_folder has nothing to keep with share_prefixes=False. Leave one of the two out.")
    raise ConfigError(
        f'kept_folder is not possible with kv_policy="{policy}": what a sequence has forgotten, another one would '
        'miss. Leave one of the two out, or give kv_policy="pages", which keeps everything.'
    )


def _behind(run: Run, place: int) -> Run:
    """Return what of a run lies behind a place in it or where it begins."""
    count = place - len(run.before)
    if not count:
        return run
    node = Node(run.tokens, run.slot, begin=len(run.before), parts=run.parts)
    parts = parts_between(node, place, node.end)
    slot = run.slot.give_up(count, len(run.tokens))
    return Run(run.scaling, run.before + run.tokens[:count], run.tokens[count:], slot, parts)
