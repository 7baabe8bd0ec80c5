"""Print what other codes of a model's exponents would take, and how fast a decoder of an entropy-coded tier must be.

Counts every exponent of all experts. Codes below a row's top have, for each row, the top from which they reach most
values; the last code also says exponent 0, so that zeros are no escapes. "Apart": an escape is a position and an
exponent, 40 bits, so that any row is read by itself. "In order": an escape is its exponent alone, 8 bits, so that a row
is found by reading all codes before it.
"""

import argparse
import json
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

APART, IN_ORDER, TOP = 40, 8, 16  # bits
SPLITS = {"bfloat16": (8, 7), "float16": (5, 10), "float32": (8, 23)}  # bits of exponent and of mantissa
BUILT = "4 bits, escapes apart"  # the format that moeflow has
READ_THREADS = 4


def main(argv: list[str] | None = None) -> int:
    """Count and print; the last line of standard output is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder of bfloat16 experts; without it the demo model")
    arguments = parser.parse_args(argv)

    import torch

    from bench.expert_matrices import expert_matrices
    from bench.machine import describe, print_card
    from moeflow.demo.model import default_demo_path

    folder = Path(arguments.model) if arguments.model else default_demo_path()
    about = describe("moeflow", "torch")
    print_card({"machine": f"{about['cpu']}, {about['cores']} cores, load {about['load']:.1f}", "model": folder.name})
    counted = {name: Counts(*split) for name, split in SPLITS.items()}
    huffman = Huffman()
    for _, expert, _, weight in expert_matrices(folder):
        bits = weight.contiguous().view(torch.int16).numpy().view("uint16")
        exponents = (bits >> 7 & 255).astype("uint8")
        counted["bfloat16"].add(exponents)
        halves = weight.to(torch.float16).view(torch.int16).numpy().view("uint16")
        counted["float16"].add((halves >> 10 & 31).astype("uint8"))
        if expert == 0:
            huffman.add(exponents)
    counted["float32"].take(counted["bfloat16"])  # a cast keeps sign and exponent
    shares = print_codes(counted)
    disk = disk_bandwidth(folder)
    found = shares["bfloat16"]
    tier = print_tier(found["entropy, a table a matrix"], found[BUILT], disk, huffman)
    print(json.dumps({"card": about, "model": folder.name, "bits": shares, "tier": tier}))
    return 0


class Counts:
    """What codes of exponents would take, summed over matrices.

    Args:
        exponent_bits: of the dtype.
        mantissa_bits: of the dtype.
    """

    def __init__(self, exponent_bits: int, mantissa_bits: int) -> None:
        self.exponent_bits, self.mantissa_bits = exponent_bits, mantissa_bits
        self.num_values = 0
        self.sums: dict[str, float] = {}

    @property
    def num_bits(self) -> int:
        """Bits of a value of the dtype."""
        return 1 + self.exponent_bits + self.mantissa_bits

    def add(self, exponents) -> None:
        """Count a matrix of exponents, uint8 [N, K]."""
        import numpy as np

        num_rows, width = len(exponents), 1 << self.exponent_bits
        self.num_values += exponents.size
        counts = np.stack([np.bincount(row, minlength=width) for row in exponents])  # [N, width]
        coded = counts * (np.arange(width) > 0)
        num_coded = coded.sum()
        tops = TOP * num_rows
        for bits in (4, 3):
            missed = num_coded - _reached(coded, (1 << bits) - 1).sum()
            for way, cost in (("apart", APART), ("in order", IN_ORDER)):
                self._sum(f"{bits} bits, escapes {way}", bits * exponents.size + cost * missed + tops)
        for bits in (3, 2):
            first = _reached(coded, (1 << bits) - 1).sum()
            both = _reached(coded, (1 << bits) - 1 + 15).sum()
            second = 4 * (exponents.size - first) + APART * (num_coded - both)
            self._sum(f"two levels, {bits} and 4 bits", bits * exponents.size + second + tops)
        self._sum("entropy, a table a matrix", _entropy(counts.sum(0, keepdims=True)))
        highest = width - 1 - (counts[:, ::-1] > 0).argmax(1)
        below = np.zeros(width, np.int64)
        for row, top in zip(counts, highest, strict=True):
            below[: top + 1] += row[top::-1]
        self._sum("entropy below a row's top, a table a matrix", _entropy(below[None]) + tops)
        self._sum("entropy, a table a row (the tables not counted)", _entropy(counts))

    def take(self, other: "Counts") -> None:
        """Take the counts of a dtype with the same exponents."""
        self.num_values, self.sums = other.num_values, other.sums

    def bits(self) -> dict[str, float]:
        """Return bits of exponent a value, by code."""
        return {name: total / self.num_values for name, total in self.sums.items()}

    def _sum(self, name: str, bits: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(bits)


def _reached(counts, width: int):
    """Return [N]: how many values of each row the best window of so many exponents holds; counts is [N, exponents]."""
    import numpy as np

    sums = np.pad(counts.cumsum(1), ((0, 0), (width, 0)))
    return (sums[:, width:] - sums[:, :-width]).max(1)


def _entropy(counts) -> float:
    """Return the bits of an ideal code for each row of counts, summed."""
    import numpy as np

    total = counts.sum(1, keepdims=True)
    shares = np.where(counts > 0, counts / total, 1.0)
    return float(-(counts * np.log2(shares)).sum())


class Huffman:
    """A Huffman code of exponents as zlib has it, timed on one thread: a coder that is there, no ideal one."""

    def __init__(self) -> None:
        self.num_values = self.num_bytes = 0
        self.seconds = 0.0

    def add(self, exponents) -> None:
        """Encode a matrix of exponents, uint8 [N, K]; time its decoding."""
        encoder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        stored = encoder.compress(exponents.tobytes()) + encoder.flush()
        begin = time.perf_counter()
        again = zlib.decompress(stored, -15, exponents.size)
        self.seconds += time.perf_counter() - begin
        if again != exponents.tobytes():
            raise RuntimeError("zlib gave other bytes back")
        self.num_values += exponents.size
        self.num_bytes += len(stored)

    @property
    def bits(self) -> float:
        """Bits of exponent a value."""
        return 8 * self.num_bytes / self.num_values

    @property
    def speed(self) -> float:
        """Bytes of bfloat16 a second whose exponents one thread decodes."""
        return 2 * self.num_values / self.seconds


def print_codes(counted: dict[str, Counts]) -> dict[str, dict[str, float]]:
    """Print bits a weight and shares of the dtype's own for each code; return the bits a weight."""
    print(f"{'bits a weight, and share of its dtype':48}" + "".join(f"{name:>18}" for name in counted))
    found: dict[str, dict[str, float]] = {name: {} for name in counted}
    for code in counted["bfloat16"].sums:
        line = f"{code:48}"
        for name, counts in counted.items():
            bits = 1 + counts.mantissa_bits + counts.bits()[code]
            found[name][code] = bits
            line += f"{bits:10.3f} {bits / counts.num_bits:7.4f}"
        print(line)
    print()
    return found


def disk_bandwidth(folder: Path) -> float:
    """Return the bytes a second in which the store reads all experts, by as many threads as moeflow has."""
    import threading

    import numpy as np

    from moeflow import load_moe
    from moeflow.core import ExpertKey

    model = load_moe(folder, device="cpu", predictor=None, step="python")
    store, room = model.moeflow.store, threading.local()

    def read(key: ExpertKey) -> int:
        if not hasattr(room, "record"):
            room.record = np.empty(max(source.layout.record.num_bytes for source in store.layers), np.uint8)
        return store.read(key, room.record)

    keys = [
        ExpertKey(layer, expert)
        for layer, source in enumerate(store.layers)
        for expert in range(source.layout.num_experts)
    ]
    try:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            begin = time.perf_counter()
            total = sum(pool.map(read, keys))
            return total / (time.perf_counter() - begin)
    finally:
        model.moeflow.close()


def print_tier(entropy: float, built: float, disk: float, huffman: Huffman) -> dict:
    """Print what a decoder of the entropy-coded tier must reach, and what zlib's reaches."""
    needed = {
        "from memory, to beat a read of lossless records": 16 * disk / built,
        "from the disk, decoding beside the reads": 16 * disk / entropy,
        "from the disk, decoding after each read": 16 * disk / (built - entropy),
    }
    print(f"the disk gives {disk / 1e9:.2f} GB/s, records in order, {READ_THREADS} threads")
    print(f"GB/s of bfloat16 that a decoder of {entropy:.2f} bits a weight needs:")
    for what, speed in needed.items():
        print(f"  {what:50} {speed / 1e9:6.2f}")
    speed = f"one thread decodes {huffman.speed / 1e9:.2f} GB/s of bfloat16"
    print(f"zlib's Huffman code: {8 + huffman.bits:.2f} bits a weight, {speed}")
    print(f"memory full of it holds {built / entropy:.2f} times the experts of the format that is built\n", flush=True)
    return {
        "disk_bytes_per_s": disk,
        "bits": entropy,
        "needed_bytes_per_s": needed,
        "zlib": {"bits": 8 + huffman.bits, "bytes_per_s": huffman.speed},
    }


if __name__ == "__main__":
    sys.exit(main())
