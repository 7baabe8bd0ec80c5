"""Checks of disks: free bytes, whether they can be written, whether reads past the page cache work.

Knows folders and file systems. Knows nothing of what is in a model's files.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moeflow.doctor.finding import BROKEN, HARMFUL, Finding
from moeflow.formatting import format_bytes
from moeflow.machine.identity import disk_of
from moeflow.machine.measuring.disk import refuse_cache
from moeflow.paths import cache_folder

_LITTLE_BYTES = 2 << 30
_NETWORK = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "drvfs", "vboxsf", "ceph")
_WEIGHTS = ("*.moeflow", "*.safetensors", "*.gguf")


def check_cache_folder() -> Iterator[Finding]:
    """Look at the cache folder's disk: a file is written there, which has no name."""
    folder = cache_folder()
    name, found = "cache folder", f"{folder} on {disk_of(folder)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            os.pwrite(file.fileno(), bytes(1 << 16), 0)
            is_direct = refuse_cache(file.fileno())
    except OSError as error:
        yield Finding(name, found, BROKEN, f"it cannot be written: {error.strerror}",
                      "set MOEFLOW_CACHE to a folder of yours, on a disk with room")  # fmt: skip
        return
    yield from _disk(name, found, folder, is_direct)


def check_model_disk(folder: Path) -> Iterator[Finding]:
    """Look at the disk of a model.

    Args:
        folder: that the model's weights lie in.
    """
    name, found = "model's disk", f"{folder} on {disk_of(folder)}"
    file = next((file for form in _WEIGHTS for file in sorted(folder.glob(form))), None)
    if file is None:
        yield Finding(name, found, BROKEN, "there are no weights", "give the folder of a model")
        return
    try:
        with open(file, "rb", buffering=0) as opened:
            is_direct = refuse_cache(opened.fileno())
    except OSError as error:
        yield Finding(name, found, BROKEN, f"{file.name} cannot be read: {error.strerror}", "mend its permissions")
        return
    yield from _disk(name, found, folder, is_direct)


def _disk(name: str, found: str, folder: Path, is_direct: bool) -> Iterator[Finding]:
    free, kind = shutil.disk_usage(folder).free, disk_of(folder)
    found += f", {format_bytes(free)} free, direct reads {'work' if is_direct else 'do not work'}"
    if any(f"({network}" in kind for network in _NETWORK):
        yield Finding(name, found, HARMFUL, "experts come over a network, or from another system's disk",
                      "keep models on a disk of this machine")  # fmt: skip
    elif not is_direct:
        yield Finding(name, found, HARMFUL,
                      "experts are read through the page cache: it takes memory, and is slower on a quick disk",
                      "keep models on ext4, xfs or btrfs")  # fmt: skip
    elif free < _LITTLE_BYTES:
        yield Finding(name, found, HARMFUL, "the disk is nearly full", "make room: pack and quantize write new files")
    else:
        yield Finding(name, found)
