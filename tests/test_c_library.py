"""Compiled libraries: found beside a module, or absent with one warning."""

import ctypes
import logging
from importlib.machinery import EXTENSION_SUFFIXES

import pytest

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
    assert "nothing was not built: sums are slower" in record.getMessage()
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
