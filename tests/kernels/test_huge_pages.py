"""Weights on huge pages: the same addresses and values, and nothing that is not mostly theirs is moved."""

import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from moeflow.kernels.cpu.huge_pages import PAGE_BYTES, use_huge_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")


def memory(pages):
    """Filled memory and the address of its first whole huge page."""
    block = np.frombuffer(mmap.mmap(-1, (pages + 1) * PAGE_BYTES), np.uint8)
    block[:] = np.arange(block.size, dtype=np.uint64) % 251
    return block, -(-block.ctypes.data // PAGE_BYTES) * PAGE_BYTES


def huge_bytes(address):
    """Bytes on huge pages of the mapping that an address lies in."""
    found = inside = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name and not name.endswith(":"):
            begin, end = (int(part, 16) for part in name.split("-"))
            inside = begin <= address < end
        elif inside and name in ("AnonHugePages:", "ShmemPmdMapped:"):
            found += int(rest.split()[0]) << 10
    return found


def test_what_lies_in_memory_stays_as_it_was():
    block, address = memory(3)
    expected = block.copy()
    moved = use_huge_pages([(address, 3 * PAGE_BYTES)])
    assert moved in (0, 3 * PAGE_BYTES)  # a system without them moves none
    assert huge_bytes(address) >= moved
    assert np.array_equal(block, expected)


def test_pages_that_are_mostly_of_others_stay():
    _block, address = memory(3)
    third = PAGE_BYTES // 3
    assert use_huge_pages([(address + PAGE_BYTES, third)]) == 0
    assert use_huge_pages([]) == 0
    small = [(address + PAGE_BYTES + i * third, third) for i in range(2)]  # together they fill it
    assert use_huge_pages(small) in (0, PAGE_BYTES)


def test_memory_that_is_not_there_is_left_alone():
    assert use_huge_pages([(PAGE_BYTES << 20, PAGE_BYTES)]) == 0
    assert ctypes.string_at(b"alive") == b"alive"
