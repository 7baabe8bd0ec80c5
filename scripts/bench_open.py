"""How fast things open: the package, the command line's help, and the index of a 671B-parameter checkpoint.

    python scripts/bench_open.py [--repeats 5]

The checkpoint is made of sparse files, with headers as DeepSeek-V3 in bfloat16 would have them (163 shards, 44,788
tensors), in a temporary folder.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # for helpers.large_checkpoint, which no install brings

_IMPORT = "import time; b = time.perf_counter(); import {name}; print(time.perf_counter() - b)"
_HELP = """
import subprocess, sys, time
begin = time.perf_counter()
subprocess.run([sys.executable, "-m", "moeflow", "--help"], stdout=subprocess.DEVNULL, check=True)
print(time.perf_counter() - begin)
"""
_PYTHON = _HELP.replace('"-m", "moeflow", "--help"', '"-c", ""')
_OPEN = """
import sys, time
from moeflow.checkpoint.headers import open_checkpoint
begin = time.perf_counter()
checkpoint = open_checkpoint(sys.argv[1])
print(time.perf_counter() - begin)
from moeflow.hardware import process_memory_bytes
print(process_memory_bytes()[1])
"""
_MAP = """
import sys, time
import torch
from transformers import DeepseekV3Config
from moeflow.hf import pretrained
from moeflow.checkpoint.headers import open_checkpoint
from moeflow.hardware import process_memory_bytes
from moeflow.hf.expert_sources import map_experts
empty = pretrained.empty_model(DeepseekV3Config(), torch.bfloat16)
before = process_memory_bytes()[1]
begin = time.perf_counter()
map_experts(empty, open_checkpoint(sys.argv[1]).tensors)
print(time.perf_counter() - begin)
print(process_memory_bytes()[1] - before)
"""


def measure(code: str, repeats: int, *arguments: str) -> list[list[float]]:
    """Run code in fresh processes; return the numbers each printed, one column a line."""
    runs = []
    for _ in range(repeats):
        run = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
        )
        runs.append([float(line) for line in run.stdout.split()])
    return [list(column) for column in zip(*runs, strict=True)]


def main(argv=None) -> None:
    """Print the table and one JSON object."""
    from helpers.large_checkpoint import write_large_checkpoint

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args(argv).repeats
    rows = {
        "import moeflow": (measure(_IMPORT.format(name="moeflow"), repeats)[0], 0.1),
        "import torch (baseline)": (measure(_IMPORT.format(name="torch"), repeats)[0], None),
        "moeflow --help": (measure(_HELP, repeats)[0], 0.3),
        "python -c '' (floor)": (measure(_PYTHON, repeats)[0], None),
    }
    with tempfile.TemporaryDirectory() as folder:
        write_large_checkpoint(Path(folder))
        seconds, peak = measure(_OPEN, repeats, folder)
        rows["open a 671B index"] = (seconds, 2.0)
        mapped, added = measure(_MAP, repeats, folder)
        rows["open it and map every expert"] = (mapped, None)
    print("| what | median s | range | limit s |\n|---|---|---|---|")
    for name, (values, limit) in rows.items():
        span = f"{min(values):.3f} to {max(values):.3f}"
        print(f"| {name} | {statistics.median(values):.3f} | {span} | {'' if limit is None else limit} |")
    print(f"\npeak memory of the process that opens the index: {max(peak) / 1e6:.0f} MB (limit 300 MB)")
    print(f"memory that opening and mapping add to a process with torch: {max(added) / 1e6:.0f} MB")
    figures = {name: statistics.median(values) for name, (values, _) in rows.items()}
    print(json.dumps({**figures, "index_peak_bytes": max(peak), "map_added_bytes": max(added)}))


if __name__ == "__main__":
    main()
