"""The library of CPU kernels: which instruction set it takes, and what is left without a compiler or OpenMP."""

import logging
import subprocess
import sys

import pytest
import torch

from helpers.cpu_experts import AVAILABLE, Expert, needs_library, run
from helpers.paths import ROOT
from moeflow.errors import ConfigError
from moeflow.kernels.cpu import library


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not loaded the library yet."""
    library.library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library.library.cache_clear()


def test_without_a_compiler_there_are_no_kernels_and_it_is_said_once(fresh, caplog):
    fresh.setattr("moeflow.c_library.EXTENSION_SUFFIXES", [])
    with caplog.at_level(logging.WARNING):
        assert library.instruction_set() is None
        assert library.instruction_set() is None
    assert len([r for r in caplog.records if "C++ compiler" in r.message]) == 1


def test_kernels_can_be_switched_off(fresh):
    fresh.setenv(library.VARIABLE, "off")
    assert library.instruction_set() is None


def test_an_unknown_path_is_refused(fresh):
    fresh.setenv(library.VARIABLE, "mmx")
    with pytest.raises(ConfigError, match=r"mmx.*avx512, avx2, portable or off"):
        library.instruction_set()


@needs_library
@pytest.mark.parametrize("name", library.INSTRUCTION_SETS)
def test_a_path_is_forced_or_falls_to_the_next(fresh, name):
    fresh.setenv(library.VARIABLE, name)
    below = library.INSTRUCTION_SETS[library.INSTRUCTION_SETS.index(name) :]
    assert library.instruction_set() == next(other for other in below if other in AVAILABLE)


@needs_library
def test_without_torch_openmp_results_are_the_same(fresh, caplog):
    expert, x = Expert(1, "bfloat16", (256, 256)), torch.randn(2, 256)
    expected = run([expert], x, [[0, 1]], 2)
    library.library().held.moeflow_cpu_openmp(None, None, None)
    assert torch.equal(run([expert], x, [[0, 1]], 2), expected)


@needs_library
def test_a_process_that_asks_for_the_instruction_set_first_has_torchs_threads():
    program = "from moeflow.kernels.cpu.library import instruction_set; print(instruction_set())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() in library.INSTRUCTION_SETS
    assert "one thread" not in done.stderr
