"""Measured ceilings of the processor: bytes read from memory and operations, a second."""

import time

import torch

from moeflow.kernels.cpu import ops as cpu
from moeflow.machine.measuring.memory import last_level_cache_bytes


def read_bandwidth(is_quick: bool = False) -> float:
    """Return the bytes a second that the compiled kernels read from memory, over 8 times the last-level cache."""
    return cpu.read_bandwidth(1 << 20 if is_quick else 8 * last_level_cache_bytes())


def peak(size: int, repeats: int = 5) -> float:
    """Return the operations a second of torch's float32 matrix product, the fastest arithmetic known here."""
    a, best = torch.randn(size, size), float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
