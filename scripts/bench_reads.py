"""How fast experts come from disk, as the demands of one layer after another, against plain reads of the same bytes.

    python scripts/bench_reads.py FOLDER [--experts 96] [--expert-bytes 2654208] [--rounds 5]

FOLDER gets a file of random experts, which is removed at the end: the disk is measured that FOLDER lies on. Plain reads
are preadv calls with O_DIRECT, whole experts from a number of threads (the depth), into slots like moeflow's. Each
measurement takes its turn beside plain reads, and is told as a share of those: disks remember bursts, so absolute
speeds move. Layouts are `packed` (one piece, at a page) and `unpacked` (at no page: two pieces side by side, the third
behind those of all experts, as where gate_up and down are stacked). Ways to read an expert are `moeflow` (as it does),
`whole` (one thread reads each contiguous range at once), `beside` (threads read ranges beside each other) and `cut`
(likewise parts of them of at most --part-kb).
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from bench.machine import describe
from bench.rounds import quotients, ranged, spread
from moeflow.checkpoint.layer_source import LayerSource, PieceTable
from moeflow.checkpoint.reading.parts import one_by_one
from moeflow.checkpoint.store import ExpertStore
from moeflow.core import PAGE_BYTES, ExpertKey, LayerLayout, RecordLayout, align_up
from moeflow.offload import transfers as transfers_module
from moeflow.offload.slot_pool import SlotPool
from moeflow.offload.streams import HostStreams
from moeflow.offload.transfers import Transfers

_ODD = 3  # bytes before the first expert of the unpacked layout
_CEILING_DEPTH = 16


def packed(num_experts: int, expert_bytes: int) -> LayerSource:
    """Return a layer of experts that are one piece each, at a page."""
    stride = align_up(expert_bytes, PAGE_BYTES)
    return _layer(num_experts, [(expert_bytes, 0, stride)])


def unpacked(num_experts: int, expert_bytes: int) -> LayerSource:
    """Return a layer of experts of three pieces: two side by side, and the third behind those of all experts."""
    third = expert_bytes // 3
    pair = expert_bytes - third
    first = pair // 2
    behind = _ODD + num_experts * pair
    return _layer(num_experts, [(first, _ODD, pair), (pair - first, _ODD + first, pair), (third, behind, third)])


def _layer(num_experts: int, pieces: list[tuple[int, int, int]]) -> LayerSource:
    copies, offset = [], 0
    for num_bytes, begin, stride in pieces:
        begins = array("Q", [begin + stride * expert for expert in range(num_experts)])
        copies.append((PieceTable("U8", (num_bytes,), num_bytes, array("H", [0]) * num_experts, begins), offset))
        offset += num_bytes
    return LayerSource(
        LayerLayout("layers.0", num_experts, RecordLayout.pack([("w", "U8", (offset,))])), tuple(copies), ()
    )


def write_file(path: Path, num_bytes: int) -> None:
    """Write random bytes past the page cache's reach: they are on the disk when this returns."""
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        for begin in range(0, num_bytes, 1 << 24):
            file.write(rng.bytes(min(1 << 24, num_bytes - begin)))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Plain:
    """Whole experts read by preadv from `depth` threads, with nothing around the reads."""

    def __init__(self, path: Path, expert_bytes: int, pool: SlotPool) -> None:
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        self._bytes, self._pool = align_up(expert_bytes, PAGE_BYTES), pool
        self._places = os.fstat(self._fd).st_size // self._bytes

    def rate(self, depth: int, order: list[int]) -> float:
        """Return bytes a second."""
        begin = time.perf_counter()
        with ThreadPoolExecutor(depth) as threads:
            num_bytes = sum(threads.map(self._read, enumerate(order)))
        return num_bytes / (time.perf_counter() - begin)

    def _read(self, work: tuple[int, int]) -> int:
        number, expert = work
        slot = self._pool.bytes[number % self._pool.num_slots].data[: self._bytes]
        return os.preadv(self._fd, [slot], expert % self._places * self._bytes)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def demands_rate(transfers: Transfers, pool: SlotPool, order: list[int], at_once: int) -> float:
    """Read experts as demands of layers, each when the one before has all of its own; return bytes a second."""
    num_bytes, begin = 0, time.perf_counter()
    for first in range(0, len(order), at_once):
        waiting, slots = order[first : first + at_once], iter(range(first, first + at_once))
        while waiting or len(transfers):
            while waiting and transfers.has_room:
                transfers.start(ExpertKey(0, waiting.pop(0)), next(slots) % pool.num_slots, None)
            ended = transfers.wait_completed()
            if ended.error is not None:
                raise ended.error
            num_bytes += ended.num_bytes
    return num_bytes / (time.perf_counter() - begin)


@contextmanager
def real(path: Path, layer: LayerSource, pool: SlotPool, threads: int, way: str, part_bytes: int) -> Iterator[Callable]:
    """Yield a measurement through moeflow's transfers that read an expert in one of the ways."""

    def read(store, threads, transfer, record, landed=None):
        share, cut = one_by_one if way == "whole" else threads.share, part_bytes if way == "cut" else None
        return store.read(transfer.key, record, share=share, part_bytes=cut)

    store = ExpertStore([path], [layer])
    transfers = Transfers(store, pool, HostStreams(), num_threads=threads)
    with nullcontext() if way == "moeflow" else mock.patch.object(transfers_module, "_read", read):
        try:
            every = list(range(min(4 * threads, layer.layout.num_experts)))
            demands_rate(transfers, pool, every, 2 * threads)  # its threads start with the first reads
            yield lambda order, at_once: demands_rate(transfers, pool, order, at_once)
        finally:
            transfers.close()
            store.close()


def main(argv=None) -> None:
    """Print the tables and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=96)
    parser.add_argument("--expert-bytes", type=int, default=2654208)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reads", type=int, default=64, help="experts of one measurement")
    parser.add_argument("--depths", default="1,2,4,8,16,32")
    parser.add_argument("--demands", default="1,2,8", help="experts of a layer that are missing")
    parser.add_argument("--threads", default="4", help="reading threads, as 4,8")
    parser.add_argument("--ways", default="moeflow,whole,beside,cut")
    parser.add_argument("--part-kb", type=int, default=1024)
    arguments = parser.parse_args(argv)
    if not hasattr(os, "preadv"):
        sys.exit("this system has no preadv: there is nothing to compare with.")
    depths, demands, threads = (
        [int(number) for number in text.split(",")] for text in (arguments.depths, arguments.demands, arguments.threads)
    )
    size, draw = (arguments.experts, arguments.expert_bytes), random.Random(0)
    pool = SlotPool(min(arguments.reads, 64), arguments.expert_bytes, torch.device("cpu"))
    cases = [
        (layout, at_once, number, way)
        for layout in (packed, unpacked)
        for at_once in demands
        for number in threads
        for way in arguments.ways.split(",")
    ]
    plain_rates: dict[int, list[float]] = {depth: [] for depth in depths}
    found: dict[tuple, tuple[list[float], list[float]]] = {case: ([], []) for case in cases}
    card = describe("torch")

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "experts.bin"
        write_file(path, _ODD + size[0] * align_up(size[1], PAGE_BYTES))
        plain = Plain(path, size[1], pool)

        def order() -> list[int]:
            return [draw.randrange(size[0]) for _ in range(arguments.reads)]

        def distinct(at_once: int) -> list[int]:
            return [e for _ in range(-(-arguments.reads // at_once)) for e in draw.sample(range(size[0]), at_once)]

        for turn in range(arguments.rounds + 1):
            for depth in depths if turn % 2 else depths[::-1]:
                rate = plain.rate(depth, order())
                plain_rates[depth] += [rate] if turn else []
            for case in cases if turn % 2 else cases[::-1]:
                layout, at_once, number, way = case
                with real(path, layout(*size), pool, number, way, arguments.part_kb << 10) as measure:
                    before = plain.rate(_CEILING_DEPTH, order())
                    rate = measure(distinct(at_once), at_once)
                    after = plain.rate(_CEILING_DEPTH, order())
                if turn:
                    found[case][0].append((before + after) / 2)
                    found[case][1].append(rate)
        plain.close()

    print(f"{card['cpu']}, {card['cores']} cores, load {card['load']:.2f}; experts of {size[1]:,} bytes\n")
    print("| plain reads at a time | GB/s (range) | / those at 4 |\n|---|---|---|")
    rows = []
    for depth, rates in plain_rates.items():
        ratio = quotients(rates, plain_rates.get(4, rates))
        print(f"| {depth} | {ranged(spread(rates), 1e-9, 5, 2)} | {ranged(ratio, 1, 4, 2)} |")
        rows.append({"plain_depth": depth, "bytes_per_s": spread(rates), "to_depth_4": ratio})
    print(f"\n| layout | experts of a layer | threads | way | GB/s (range) | / plain at {_CEILING_DEPTH} | / whole |")
    print("|---|---|---|---|---|---|---|")
    for (layout, at_once, number, way), (ceiling, rates) in found.items():
        whole = found.get((layout, at_once, number, "whole"), (ceiling, rates))[1]
        ratio, to_whole = quotients(rates, ceiling), quotients(rates, whole)
        about = f"| {layout.__name__} | {at_once} | {number} | {way} | {ranged(spread(rates), 1e-9, 5, 2)}"
        print(f"{about} | {ranged(ratio, 1, 4, 2)} | {ranged(to_whole, 1, 4, 2)} |")
        rows.append({"layout": layout.__name__, "demanded": at_once, "threads": number, "way": way,
                     "bytes_per_s": spread(rates), "to_plain": ratio, "to_whole": to_whole})  # fmt: skip
    print(json.dumps({**card, "expert_bytes": size[1], "rows": rows}))


if __name__ == "__main__":
    main()
