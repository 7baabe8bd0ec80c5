"""Copies by one thread have every number, and wake no other thread."""

import subprocess
import sys

import pytest
import torch

from moeflow.dtypes import serial_copy

CODE = """
import os
import torch
from moeflow.dtypes import serial_copy

torch.set_num_threads(3)
x = torch.empty(200_000, dtype=torch.bfloat16)
threads = []
for copy in (lambda: None, lambda: serial_copy(x), lambda: serial_copy(x, torch.float32), lambda: x.float()):
    copy()
    threads.append(len(os.listdir("/proc/self/task")))
print(threads)
"""


@pytest.mark.parametrize("shape", [(3, 1, 50_000), (16_385,), (0, 4), (), (2, 7)], ids=str)
def test_a_serial_copy_is_a_copy(shape):
    tensor = torch.randn(shape).bfloat16()
    whole, wide = serial_copy(tensor), serial_copy(tensor, torch.float32)
    assert torch.equal(whole, tensor)
    assert torch.equal(wide, tensor.float())
    if tensor.numel():
        assert whole.data_ptr() != tensor.data_ptr()
    columns = torch.randn(40_000, 3)[:, 1]
    assert torch.equal(serial_copy(columns), columns)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_serial_copy_needs_no_other_thread():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    before, *serial, shared = map(int, done.stdout.strip("[]\n").split(","))
    assert serial == [before, before]
    assert shared > before, "torch itself shares such a copy"
