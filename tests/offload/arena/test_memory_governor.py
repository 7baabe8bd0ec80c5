"""The automatic budget: it follows free memory, keeps a reserve, and obeys a real memory cgroup."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT
from moeflow import hardware
from moeflow.offload.arena.memory_governor import MemoryGovernor

MIB = 1 << 20


@pytest.fixture
def governor(monkeypatch):
    monkeypatch.setattr(hardware, "memory_limit_bytes", lambda: 1000 * MIB)
    return MemoryGovernor(MIB, min_slots=3, max_slots=500)


def test_it_grows_into_free_memory_and_leaves_a_reserve(governor):
    limit = 10
    for _ in range(60):  # a machine where only the experts take memory: 400 MiB are free without them
        limit = governor.target(limit, limit, (400 - limit) * MIB)
    assert 340 <= limit <= 350  # 50 MiB are kept


def test_it_gives_memory_back_when_something_else_takes_it(governor):
    limit = governor.target(300, 300, 10 * MIB)
    assert limit == 300 - 40 - 1


def test_empty_slots_under_the_limit_count_as_taken(governor):
    assert governor.target(100, 300, 210 * MIB) < 300


def test_it_stays_between_its_bounds(governor):
    assert governor.target(5, 5, 0) == 3
    assert governor.target(499, 499, 10_000 * MIB) == 500


_RUN = """
import sys
from pathlib import Path
group = Path(sys.argv[1])
(group / "cgroup.procs").write_text("0")
import torch
torch.set_num_threads(1)
import moeflow
from moeflow.hardware import memory_limit_bytes
with moeflow.load_moe(sys.argv[2]).moeflow as runtime:
    print(memory_limit_bytes(), runtime.stats()["slots"])
"""


@pytest.mark.slow
def test_limit_of_a_memory_cgroup_is_seen(mixtral_folder):
    root = Path("/sys/fs/cgroup/memory")
    if not os.access(root / "cgroup.procs", os.W_OK):
        pytest.skip("this machine does not let us make a memory cgroup")
    group = root / f"moeflow-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(900 * MIB))
        run = subprocess.run(
            [sys.executable, "-c", _RUN, str(group), str(mixtral_folder)], capture_output=True, text=True, cwd=ROOT
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.split() == [str(900 * MIB), "24"]
    finally:
        group.rmdir()
