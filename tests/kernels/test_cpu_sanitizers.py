"""The CPU kernels built with address and undefined-behaviour sanitizers, run over odd shapes by a C++ driver."""

import os
import shutil
import subprocess

import pytest

from helpers.paths import ROOT


@pytest.mark.skipif(not os.environ.get("MOEFLOW_SANITIZE"), reason="builds for minutes: set MOEFLOW_SANITIZE=1")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_kernels_read_and_write_only_what_is_theirs(tmp_path):
    folder = ROOT / "kernels" / "cpu"
    sources = [ROOT / "tests" / "helpers" / "cpu_kernels_driver.cpp", *sorted(folder.glob("_cpu*.cpp"))]
    flags = [
        "-std=c++17",
        "-O1",
        "-w",
        "-ffp-contract=off",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    program = tmp_path / "driver"
    subprocess.run(["g++", *flags, f"-I{folder}", *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "portable clean" in done.stdout
