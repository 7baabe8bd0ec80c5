"""The machine's checks: what harms is named with a remedy, what is well stays in one line."""

import os
import re

import pytest

from moeflow.doctor.check_machine import check_machine
from moeflow.doctor.finding import BROKEN, FINE, HARMFUL, LEVELS
from moeflow.doctor.machine.disks import check_cache_folder, check_model_disk
from moeflow.doctor.machine.environment import check_clock, check_environment
from moeflow.doctor.machine.memory import check_huge_pages
from moeflow.doctor.machine.software import check_libraries, check_software
from moeflow.machine.identity import usable_cores


def only(findings):
    (found,) = findings
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_wrong_comes_with_a_remedy(mixtral_folder):
    found = check_machine(mixtral_folder)
    names = {one.name for one in found}
    assert names >= {"moeflow", "kernels", "threads", "memory", "swap", "cache folder", "model's disk", "GPU", "clock"}
    for one in found:
        assert one.level in LEVELS
        assert bool(one.wrong) == bool(one.remedy) == (one.level != FINE), one


def test_libraries_that_are_missing_or_of_another_version_are_broken():
    found = list(check_libraries(["numpy>=1", "numpy>=99", "no-such-library>=3", 'numpy>=98; python_version < "3"']))
    assert [(one.name, one.level) for one in found[:2]] == [("numpy", BROKEN), ("no-such-library", BROKEN)]
    assert 'pip install "no-such-library>=3"' in found[1].remedy
    assert re.fullmatch(r"numpy \d.*", found[2].found)
    assert len(found) == 3


@pytest.mark.parametrize(("value", "level"), [("off", HARMFUL), ("sse9", BROKEN), ("portable", HARMFUL), ("", FINE)])
def test_kernels_that_are_off_unknown_or_slow_are_told(value, level, monkeypatch):
    best = {one.name: one for one in check_software()}["kernels"]
    if best.level != FINE or best.found.startswith("portable"):
        pytest.skip("no fast kernels here")
    monkeypatch.setenv("MOEFLOW_CPU_KERNELS", value)
    assert {one.name: one for one in check_software()}["kernels"].level == level


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OMP_NUM_THREADS", str(usable_cores() + 1)),
        ("MKL_NUM_THREADS", "many"),
        ("HF_HUB_OFFLINE", "1"),
        ("TRANSFORMERS_OFFLINE", "true"),
        ("CUDA_LAUNCH_BLOCKING", "1"),
        ("PYTHONMALLOC", "malloc_debug"),
    ],
)
def test_variables_that_harm_are_named(name, value):
    found = only(check_environment({name: value}))
    assert (found.name, found.level) == (name, HARMFUL)


def test_variables_that_do_no_harm_are_not_named():
    harmless = {"OMP_NUM_THREADS": str(usable_cores()), "HF_HUB_OFFLINE": "0", "CUDA_LAUNCH_BLOCKING": "", "HOME": "/"}
    assert only(check_environment(harmless)).level == FINE


def test_a_file_in_place_of_the_hubs_folder_is_broken(tmp_path):
    (tmp_path / "file").write_text("")
    assert only(check_environment({"HF_HOME": str(tmp_path / "file")})).level == BROKEN


@pytest.mark.parametrize(("text", "level"), [("always madvise [never]", HARMFUL), ("always [madvise] never", FINE)])
def test_huge_pages_that_are_off_are_told(tmp_path, text, level):
    file = tmp_path / "sys/kernel/mm/transparent_hugepage/enabled"
    file.parent.mkdir(parents=True)
    assert list(check_huge_pages(tmp_path)) == []
    file.write_text(text)
    assert only(check_huge_pages(tmp_path)).level == level


@pytest.mark.parametrize(("source", "level"), [("tsc", FINE), ("kvm-clock", FINE), ("hpet", HARMFUL)])
def test_a_slow_clock_is_told(tmp_path, source, level):
    file = tmp_path / "sys/devices/system/clocksource/clocksource0/current_clocksource"
    file.parent.mkdir(parents=True)
    file.write_text(source + "\n")
    assert only(check_clock(tmp_path)).level == level


def test_a_clock_that_is_behind_is_told(tmp_path):
    assert only(check_clock(tmp_path, now_s=1e9)).level == HARMFUL


def test_a_cache_folder_that_cannot_be_written_is_broken(cache):
    assert only(check_cache_folder()).level == FINE
    assert os.listdir(cache) == []
    cache.rmdir()
    cache.write_text("a file in its place")
    found = only(check_cache_folder())
    assert (found.level, "MOEFLOW_CACHE" in found.remedy) == (BROKEN, True)


def test_a_folder_without_weights_is_broken(tmp_path, mixtral_folder):
    assert only(check_model_disk(tmp_path)).level == BROKEN
    assert only(check_model_disk(mixtral_folder)).level != BROKEN
