"""Profiles in the cache folder: one file for each machine and disk.

Knows files. Knows nothing of how a profile is measured.
"""

import hashlib
import json
import logging
from pathlib import Path

from moeflow.atomic_file import NO_CHECKSUM, cannot_write, is_sealed, seal, write_atomically
from moeflow.errors import ConfigError, MoeflowError
from moeflow.machine.identity import disk_of, hardware
from moeflow.machine.profile import MachineProfile
from moeflow.paths import cache_folder

_log = logging.getLogger(__name__)


def kept_profile(folder_on_disk: Path | None = None) -> MachineProfile | None:
    """Return the profile that was measured on this machine, as it is now.

    Args:
        folder_on_disk: whose disk was read; None takes the latest of any disk.

    Returns:
        The profile; None where there is none, or hardware, limits or moeflow's version changed since.
    """
    machine = hardware()
    if folder_on_disk is not None:
        return _read(profile_file(machine, disk_of(folder_on_disk)), machine)
    files = _folder().glob(f"{_digest(machine)}-*.json")
    dated = sorted(((file.stat().st_mtime_ns, file) for file in files), reverse=True)
    return next((found for _, file in dated if (found := _read(file, machine)) is not None), None)


def keep_profile(profile: MachineProfile) -> Path:
    """Write a profile into the cache folder, in place of the one of the same machine and disk.

    Returns:
        The file.

    Raises:
        MoeflowError: the folder cannot be written.
    """
    file = profile_file(profile.hardware, profile.disk)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoeflowError(cannot_write(file, error)) from error
    content = json.dumps({"crc32": NO_CHECKSUM, "profile": profile.to_dict()}, indent=1)
    write_atomically(file, seal(content.encode()))
    return file


def profile_file(machine: str, disk: str) -> Path:
    """Return where the profile of a machine and a disk is kept."""
    return _folder() / f"{_digest(machine)}-{_digest(disk)}.json"


def _folder() -> Path:
    return cache_folder() / "machine"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(file: Path, machine: str) -> MachineProfile | None:
    """Read a profile; one that is damaged or of another version counts as none."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    try:
        if not is_sealed(content):
            raise ConfigError("its checksum does not agree.")
        found = MachineProfile.from_dict(json.loads(content)["profile"])
    except (ConfigError, ValueError, KeyError) as error:
        _log.warning("%s is not used: %s", file, error)
        return None
    return found if found.hardware == machine else None
