"""The card of the kernels' benchmark: the machine, its ceilings, versions."""

import importlib.util
import os
import time
from pathlib import Path

import torch
import transformers

from moeflow.kernels.cpu import ops as cpu
from moeflow.kernels.cpu.library import instruction_set


def describe(is_quick: bool) -> dict:
    """Return the card: the machine, its ceilings, versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cache = last_level_cache_bytes()
    return {
        "cpu": (names or ["unknown CPU"])[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "last_level_cache_bytes": cache,
        "instruction_set": instruction_set(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "read_bytes_per_s": cpu.read_bandwidth(1 << 20 if is_quick else 8 * cache),
        "peak_flop_per_s": peak(256 if is_quick else 2048),
        "not_installed": [name for name in ("bitsandbytes", "torchao") if importlib.util.find_spec(name) is None],
    }


def last_level_cache_bytes() -> int:
    """Return the size of the largest cache of the first core; 32 MiB where the system does not say."""
    sizes = [
        int(file.read_text().strip()[:-1]) << 10 for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")
    ]
    return max(sizes, default=32 << 20)


def peak(size: int, repeats: int = 5) -> float:
    """Return the operations a second of torch's float32 matrix product, the fastest arithmetic known here."""
    a, best = torch.randn(size, size), float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def print_card(card: dict) -> None:
    """Print the card."""
    print(f"machine   {card['cpu']}, {card['cores']} cores, {card['threads']} threads used, load {card['load']:.1f}")
    print(f"cache     {card['last_level_cache_bytes'] >> 20} MiB")
    print(f"kernels   {card['instruction_set']}; torch {card['torch']} ({card['torch_capability']})")
    print(
        f"ceiling   {card['read_bytes_per_s'] / 1e9:.1f} GB/s read; {card['peak_flop_per_s'] / 1e9:.0f} GFLOP/s float32"
    )
    print(f"also      not installed: {', '.join(card['not_installed']) or '-'}; llama.cpp: see bench_decode\n")
