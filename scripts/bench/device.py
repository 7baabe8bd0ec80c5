"""The device of a benchmark: its option, the wait for what it still computes, and the bandwidth of its memory."""

import argparse
import time
from typing import Any


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device` to a benchmark's options; the CPU where it is not given."""
    parser.add_argument("--device", default="cpu", metavar="D", help='"cpu", "cuda" or "cuda:N" (cpu)')


def synchronize(device: Any) -> None:
    """Wait until a device has computed all that was queued, as a clock must."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def read_bandwidth(device: Any) -> float:
    """Return the bytes a second that are read from a device's memory; on the CPU by the compiled kernels."""
    import torch

    from moeflow.kernels.cpu import ops as cpu

    if torch.device(device).type == "cpu":
        return cpu.read_bandwidth()
    large, best = torch.ones(1 << 28, device=device), float("inf")
    for _ in range(10):
        synchronize(device)
        begin = time.perf_counter()
        large.sum()
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return large.numel() * large.element_size() / best
