"""Bytes a second between host and card, by kind of host memory, size of a copy, and direction; of the card's memory."""

import ctypes
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from bench.device import synchronize
from gpu.worker import Tell

KINDS = ("registered", "pinned", "pageable")
SIZES = (1 << 20, 2_650_000, 9_437_184, 256 << 20)  # a piece, an int4 expert, a bfloat16 expert, all at once
_SPACE = 256 << 20  # bytes that are copied in a measurement, however small a copy
_REPEATS = 7


def run(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Measure every kind, size and direction; return the bandwidth of the card's memory."""
    device, dry = torch.device(job["device"]), job["dry"]
    space = 1 << 20 if dry else _SPACE
    on_card = torch.empty(space, dtype=torch.uint8, device=device)
    for kind in KINDS:
        if dry and kind != "pageable":  # nothing can be pinned without CUDA
            continue
        with host_memory(kind, space) as on_host:
            for size in [min(size, space) for size in (SIZES[:1] if dry else SIZES)]:
                for direction in ("to the card", "from the card"):
                    source, target = (on_host, on_card) if direction == "to the card" else (on_card, on_host)
                    seconds = time_copies(target, source, size, device)
                    row = {"memory": kind, "direction": direction, "copy_bytes": size}
                    tell({**row, "gb_per_s": len(source) // size * size / seconds / 1e9})
    values = on_card.view(torch.float32)
    other = torch.empty_like(values)
    read_s = median_s(lambda: values.sum(), device)
    copy_s = median_s(lambda: other.copy_(values), device)
    return {"card_read_gb_per_s": space / read_s / 1e9, "card_copy_gb_per_s": 2 * space / copy_s / 1e9}


def time_copies(target: torch.Tensor, source: torch.Tensor, size: int, device: torch.device) -> float:
    """Return the seconds of copying all of a block in copies of `size` bytes, one after another."""

    def copy() -> None:
        for begin in range(0, len(source) - size + 1, size):
            target[begin : begin + size].copy_(source[begin : begin + size], non_blocking=True)

    return median_s(copy, device)


def median_s(work: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of some work, after one run to warm up; the card is waited for."""
    times = []
    for _ in range(_REPEATS + 1):
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


@contextmanager
def host_memory(kind: str, num_bytes: int) -> Iterator[torch.Tensor]:
    """Give a block of host memory [num_bytes] uint8 with pages behind it.

    Raises:
        RuntimeError: it cannot be registered; names CUDA's error.
    """
    if kind != "registered":
        yield (
            torch.ones(num_bytes, dtype=torch.uint8).pin_memory()
            if kind == "pinned"
            else torch.ones(num_bytes, dtype=torch.uint8)
        )
        return
    block = torch.from_numpy(np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)).fill_(1)
    cudart = torch.cuda.cudart()
    torch.cuda.init()
    code = cudart.cudaHostRegister(ctypes.c_void_p(block.data_ptr()).value, num_bytes, 0)
    if int(code):
        raise RuntimeError(f"cudaHostRegister of {num_bytes:,} bytes: CUDA error {int(code)}")
    try:
        yield block
    finally:
        cudart.cudaHostUnregister(block.data_ptr())
