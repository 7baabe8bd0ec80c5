"""Compiled libraries: found beside a module, or absent with one warning."""

import ctypes
import logging
import shutil
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import moeflow.replay as replay
from moeflow.c_library import built_library, c_function


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing found before counts."""
    c_function.cache_clear()
    yield
    c_function.cache_clear()


def absent(beside, name="nothing"):
    return c_function(name, beside, (ctypes.c_int,), ctypes.c_int, without="sums are slower")


def test_an_absent_library_is_none_and_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert absent(str(tmp_path / "module.py")) is None
        assert absent(str(tmp_path / "module.py")) is None
    (record,) = caplog.records
    assert "nothing cannot be used (_nothing was not built beside" in record.getMessage()
    assert "): sums are slower" in record.getMessage()
    assert "C compiler" in record.getMessage()


def test_a_file_that_is_no_library_counts_as_absent(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("moeflow.c_library.EXTENSION_SUFFIXES", [".so"])
    (tmp_path / "_torn.so").write_bytes(b"not a library")
    assert built_library("_torn", str(tmp_path / "module.py")) == str(tmp_path / "_torn.so")
    assert absent(str(tmp_path / "module.py"), "torn") is None
    assert len(caplog.records) == 1


def test_each_library_that_is_absent_has_its_own_warning(tmp_path, caplog):
    for name in ("one", "other"):
        assert absent(str(tmp_path / "module.py"), name) is None
    assert [record.args[0] for record in caplog.records] == ["one", "other"]


def test_a_plain_name_comes_before_one_with_a_python_abi(tmp_path):
    tagged = tmp_path / f"_sum{EXTENSION_SUFFIXES[0]}"
    for path in (tagged, tmp_path / "_sum.so"):
        path.touch()
    assert built_library("_sum", str(tmp_path / "module.py")) == str(tmp_path / "_sum.so")
    (tmp_path / "_sum.so").unlink()
    assert built_library("_sum", str(tmp_path / "module.py")) == str(tagged)


def test_a_library_of_other_sources_is_not_called(tmp_path, caplog):
    """Its functions may take other arguments: a call would end the process."""
    if not Path(replay.__file__).with_name("_replay.so").is_file():
        pytest.skip("the C loop was not built")
    built = shutil.copy(built_library("_replay", replay.__file__), tmp_path)
    module = str(tmp_path / "module.py")
    assert built_library("_replay", module) == built  # as in an installation, without sources
    (tmp_path / "_replay.c").write_bytes(Path(replay.__file__).with_name("_replay.c").read_bytes())
    assert built_library("_replay", module) == built
    with (tmp_path / "_replay.c").open("a") as sources:
        sources.write("/* another argument */")
    with pytest.raises(FileNotFoundError, match="built of other sources"):
        built_library("_replay", module)
    assert absent(module, "replay") is None
    assert "built of other sources" in caplog.text


def test_a_library_that_does_not_tell_its_sources_is_not_called_beside_some(tmp_path):
    lines = Path("/proc/self/maps").read_text().splitlines()
    shutil.copy(next(line.split()[-1] for line in lines if "/libm.so" in line), tmp_path / "_old.so")
    assert built_library("_old", str(tmp_path / "module.py"))
    (tmp_path / "_old.c").write_text("int moeflow_old(void);")
    with pytest.raises(FileNotFoundError, match="built of other sources"):
        built_library("_old", str(tmp_path / "module.py"))
