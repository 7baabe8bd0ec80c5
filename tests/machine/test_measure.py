"""Measuring a machine: every figure is there, nothing is left behind, what cannot be measured is named."""

import math
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from moeflow.errors import ConfigError, MoeflowError
from moeflow.fit.memory import READ_THREADS
from moeflow.machine.identity import disk_of, hardware, usable_cores
from moeflow.machine.measure import measure_profile
from moeflow.machine.measuring.disk import EXPERT_BYTES, IN_FLIGHT, disk_read
from moeflow.machine.measuring.experts import FEW_TOKENS, MEASURED, Experts, expert_speeds
from moeflow.machine.store import kept_profile
from moeflow.paths import cache_folder

SMALL_FILE = 1 << 26  # bytes that are written to be read


@pytest.mark.slow
def test_every_figure_is_measured_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "cache"))
    models, told, before = tmp_path / "models", [], torch.get_num_threads()
    models.mkdir()
    profile = measure_profile(models, seconds=0.2, progress=lambda share, text: told.append(share))
    assert kept_profile(models) == kept_profile() == profile
    assert (profile.hardware, profile.disk, profile.threads) == (hardware(), disk_of(models), before)
    assert torch.get_num_threads() == before
    assert {1, usable_cores()} <= set(profile.memory_read)
    assert tuple(profile.disk_read) == tuple(profile.disk_read_alone) == EXPERT_BYTES
    assert {name: tuple(rates) for name, rates in profile.kernel_read.items()} == dict.fromkeys(MEASURED, FEW_TOKENS)
    assert set(profile.kernel_flops) == set(MEASURED)
    assert set(profile.layer_s) == {"native", "python", "missing"}
    assert set(profile.step_s) == {"native", "python"}
    figures = [
        *profile.memory_read.values(), *profile.disk_read.values(), *profile.disk_read_alone.values(),
        *(rate for rates in profile.kernel_read.values() for rate in rates.values()), *profile.kernel_flops.values(),
        profile.memory_touch, *profile.first_check.values(), profile.dense_read, profile.dense_flops,
        *profile.layer_s.values(), *profile.step_s.values(),
    ]  # fmt: skip
    assert all(0 < figure < math.inf for figure in figures)
    assert 1 << 26 < profile.process_bytes < 1 << 32
    assert 0 <= profile.others_load <= 1
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0, 1)
    assert not list(models.iterdir())


@pytest.mark.slow
def test_the_cache_folder_itself_may_be_measured_before_it_is_there(tmp_path, monkeypatch):
    """As the first `moeflow fit ORG/NAME` on a machine does."""
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "cache"))
    assert measure_profile(cache_folder(), seconds=0.1) == kept_profile(cache_folder())


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_no_time_to_measure_in_is_refused(seconds):
    with pytest.raises(ConfigError, match="seconds"):
        measure_profile(seconds=seconds)


def test_reads_in_flight_are_those_of_the_runtime():
    assert IN_FLIGHT == READ_THREADS


def test_a_models_file_is_read_and_nothing_is_written(tmp_path):
    with (tmp_path / "experts.moeflow").open("wb") as file:
        file.truncate(SMALL_FILE)
    tmp_path.chmod(0o500)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))  # root may write into any folder
    try:
        together, alone = disk_read(tmp_path, 0.05)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        tmp_path.chmod(0o700)
    assert tuple(together) == tuple(alone) == EXPERT_BYTES


def test_a_disk_that_takes_no_more_is_named_and_nothing_is_left(tmp_path):
    limit, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        with pytest.raises(MoeflowError, match="Make room"):
            disk_read(tmp_path, 0.05)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MoeflowError, match="nowhere"):
        disk_read(tmp_path / "nowhere", 0.05)


def test_a_kill_leaves_no_file(tmp_path):
    code = f"""
import os, sys
from pathlib import Path
from moeflow.machine.measuring import disk
def killed(*arguments):
    os.kill(os.getpid(), 9)
disk._rate = killed
disk.disk_read(Path({str(tmp_path)!r}), .05)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", MEASURED)
def test_the_experts_that_are_timed_compute_what_plain_torch_does(name):
    experts = Experts(name)
    for num_tokens in (1, 4):
        outputs = experts.call(num_tokens, 4)().float()
        expected = experts.in_torch(experts.tokens(num_tokens)).float()
        assert torch.isfinite(expected).all()
        assert ((outputs - expected).norm() / expected.norm()).item() < 2e-2


def test_without_compiled_kernels_torch_is_measured():
    code = """
from moeflow.machine.measuring.experts import expert_speeds
from moeflow.machine.measuring.dense import dense_speeds
read, flops = expert_speeds(.01, ("bf16", "int4-g64", "bf16-lossless"))
assert set(read) == set(flops) == {"bf16", "int4-g64"}, read
assert min(dense_speeds(.01)) > 0
"""
    environment = {**os.environ, "MOEFLOW_CPU_KERNELS": "off"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_formats_may_be_chosen():
    read, flops = expert_speeds(0.01, ("int8",))
    assert set(read) == set(flops) == {"int8"}
