"""A profile of a machine that is not this one, with round figures."""

from dataclasses import replace
from typing import Any

from moeflow.machine.profile import MachineProfile

MISS_S = 150e-6

_SMALL = MachineProfile(
    hardware="a processor, 2 cores",
    threads=2,
    memory_read={1: 8e9, 2: 14e9},
    memory_touch=4e9,
    first_check={"checksum": 2e9, "lossless": 1e9},
    disk="/ (ext4, /dev/disk)",
    disk_read={1 << 20: 1e9, 4 << 20: 2e9},
    disk_read_alone={1 << 20: 5e8, 4 << 20: 1e9},
    kernel_read={"bf16": {1: 10e9, 4: 8e9, 16: 6e9}},
    kernel_flops={"bf16": 50e9},
    dense_read=9e9,
    dense_flops=60e9,
    layer_s={"native": 2e-5, "python": 3e-4, "missing": MISS_S},
    step_s={"native": 2e-4, "python": 8e-4},
    process_bytes=400_000_000,
)


def small_profile(**figures: Any) -> MachineProfile:
    """Return the profile with other figures in some places."""
    return replace(_SMALL, **figures)
