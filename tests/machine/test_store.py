"""Kept profiles: found again on the same machine and disk, and on no other."""

import os

import pytest

from helpers.machine_profiles import small_profile
from moeflow.errors import MoeflowError
from moeflow.machine.identity import disk_of, hardware
from moeflow.machine.store import keep_profile, kept_profile, profile_file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_profile_is_found_again_on_its_machine_and_disk(tmp_path):
    profile = small_profile(hardware=hardware(), disk=disk_of(tmp_path))
    assert kept_profile() is None
    assert kept_profile(tmp_path) is None
    keep_profile(profile)
    assert kept_profile() == kept_profile(tmp_path) == kept_profile(tmp_path / "not there yet") == profile


def test_a_profile_of_another_disk_is_taken_only_where_any_disk_will_do(tmp_path):
    keep_profile(small_profile(hardware=hardware(), disk="/elsewhere (xfs, /dev/other)"))
    assert kept_profile(tmp_path) is None
    assert kept_profile() is not None


def test_the_latest_of_several_disks_is_taken():
    for number, disk in enumerate(("/first", "/second", "/third")):
        file = keep_profile(small_profile(hardware=hardware(), disk=disk))
        os.utime(file, (1000 - number, 1000 - number))
    assert kept_profile().disk == "/first"


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MOEFLOW_CPU_KERNELS", "CUDA_VISIBLE_DEVICES"])
def test_a_profile_counts_no_more_where_a_limit_changed(variable, monkeypatch):
    keep_profile(small_profile(hardware=hardware(), disk="/"))
    before = hardware()
    monkeypatch.setenv(variable, {"OMP_NUM_THREADS": "7", "MOEFLOW_CPU_KERNELS": "off"}.get(variable, ""))
    if variable == "CUDA_VISIBLE_DEVICES" and hardware() == before:
        pytest.skip("this machine has no GPU to hide")
    assert kept_profile() is None


def test_a_new_version_measures_again(monkeypatch):
    keep_profile(small_profile(hardware=hardware(), disk="/"))
    monkeypatch.setattr("moeflow.machine.identity.__version__", "99")
    assert kept_profile() is None


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: text.replace("9", "8", 1)])
def test_a_damaged_profile_counts_as_none(damage, caplog):
    file = keep_profile(small_profile(hardware=hardware(), disk="/"))
    file.write_text(damage(file.read_text()))
    assert kept_profile() is None
    assert "is not used" in caplog.text


def test_a_folder_that_cannot_be_made_is_named(cache):
    cache.write_text("a file in its place")
    with pytest.raises(MoeflowError, match="cache"):
        keep_profile(small_profile())


def test_files_are_told_apart_by_machine_and_disk():
    assert len({profile_file(machine, disk) for machine in "ab" for disk in "ab"}) == 4
