"""Measures a machine's profile, part by part, and keeps it.

Knows the parts and their shares of the time. Knows nothing of how each is measured.
"""

from pathlib import Path

from moeflow.errors import ConfigError
from moeflow.machine.identity import disk_of, hardware, usable_cores
from moeflow.machine.others_load import OthersLoad
from moeflow.machine.profile import MachineProfile
from moeflow.machine.store import keep_profile
from moeflow.paths import cache_folder
from moeflow.progress import ShareCallback

_SHARES = {
    "touch": 0.05,
    "memory": 0.06,
    "disk": 0.24,
    "experts": 0.35,
    "checks": 0.02,
    "dense": 0.06,
    "layers": 0.16,
    "copies": 0.06,
}


def _tell_nothing(share: float, text: str) -> None:
    """Tell nobody how far it is."""


def measure_profile(
    folder: Path | None = None, *, seconds: float = 20, progress: ShareCallback = _tell_nothing
) -> MachineProfile:
    """Measure what this machine can do, and keep it in the cache folder.

    Args:
        folder: a folder whose disk is read: of models; None takes the cache folder.
        seconds: that the measuring may take, about; imports of torch and transformers come on top. 4 for a quick one.
        progress: called before each part.

    Returns:
        The profile.

    Raises:
        ConfigError: `seconds` is not above 0.
        MoeflowError: the folder cannot be read or written, or a tiny model does not run.
    """
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"seconds={seconds!r} is no time to measure in. Give 20, or 4 for a quick profile.")
    place = cache_folder() if folder is None else Path(folder)
    if place == cache_folder():  # which may not be there yet
        place.mkdir(parents=True, exist_ok=True)
    others, done = OthersLoad(), 0.0

    def begin(part: str, text: str) -> float:
        nonlocal done
        progress(done, text)
        done += _SHARES[part]
        return seconds * _SHARES[part]

    progress(0.0, "importing torch")
    import torch

    from moeflow.machine.measuring.copies import copies
    from moeflow.machine.measuring.dense import dense_speeds
    from moeflow.machine.measuring.disk import disk_read
    from moeflow.machine.measuring.experts import check_speeds, expert_speeds
    from moeflow.machine.measuring.layers import layer_times
    from moeflow.machine.measuring.memory import memory_read, memory_touch

    touch = memory_touch(begin("touch", "taking memory"))  # before anything else takes memory that is fresh
    memory = memory_read(max(usable_cores(), torch.get_num_threads()), begin("memory", "reading memory"))
    disk, alone = disk_read(place, begin("disk", f"reading the disk of {place}"))
    kernel_read, kernel_flops = expert_speeds(begin("experts", "running experts in each format"))
    checks = check_speeds(begin("checks", "checking experts"))
    dense_read, dense_flops = dense_speeds(begin("dense", "multiplying with dense matrices"))
    layers = layer_times(begin("layers", "decoding with tiny models"))
    copied = copies(begin("copies", "copying to the GPU"))
    profile = MachineProfile(
        hardware=hardware(),
        threads=torch.get_num_threads(),
        memory_read=memory,
        memory_touch=touch,
        first_check=checks,
        disk=disk_of(place),
        disk_read=disk,
        disk_read_alone=alone,
        kernel_read=kernel_read,
        kernel_flops=kernel_flops,
        dense_read=dense_read,
        dense_flops=dense_flops,
        layer_s=layers["layer_s"],
        step_s=layers["step_s"],
        copy=copied,
        process_bytes=layers["process_bytes"],
        others_load=round(others.share() or 0.0, 3),
        seconds=float(seconds),
    )
    keep_profile(profile)
    progress(1.0, "done")
    return profile
