"""Memory left inside the process's own limits.

Knows cgroups. Knows nothing of torch or of GPUs.
"""

from pathlib import Path

import psutil

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes a huge number where v2 writes "max"


def available_memory_bytes() -> int:
    """Return the bytes this process can still take without anything being paged out.

    The least of what the system has free and what each memory cgroup around the process leaves, where page cache
    that no process maps counts as free. Mapped files (libraries) count as used: a process that pages them out and in
    again crawls under its limit.
    """
    available = psutil.virtual_memory().available
    for folder in _cgroup_folders():
        left = _cgroup_available_bytes(folder)
        if left is not None:
            available = min(available, left)
    return max(available, 0)


def memory_limit_bytes() -> int:
    """Return the most memory this process may ever use: the machine's, or its tightest cgroup's."""
    limits = [_cgroup_limit_bytes(folder) for folder in _cgroup_folders()]
    return min([psutil.virtual_memory().total, *(limit for limit in limits if limit is not None)])


def process_memory_bytes() -> tuple[int, int]:
    """Return (resident bytes now, peak resident bytes) of this process."""
    now = psutil.Process().memory_info().rss
    try:
        status = Path("/proc/self/status").read_text()
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = now
    return now, max(now, peak)


def _cgroup_folders() -> list[Path]:
    """List the memory cgroup of this process and its ancestors, in cgroup v1 or v2."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots = [_CGROUP_ROOT, _CGROUP_ROOT / "unified"]
        elif "memory" in controllers.split(","):
            roots = [_CGROUP_ROOT / "memory"]
        else:
            continue
        for root in roots:
            folder = root / path.lstrip("/")
            while folder.is_relative_to(root):
                folders.append(folder)
                if folder == root:
                    break
                folder = folder.parent
    return folders


def _cgroup_limit_bytes(folder: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            text = (folder / name).read_text().strip()
        except OSError:
            continue
        if text != "max" and int(text) < _UNLIMITED_BYTES:
            return int(text)
    return None


def _cgroup_available_bytes(folder: Path) -> int | None:
    limit = _cgroup_limit_bytes(folder)
    if limit is None:
        return None
    usage_file = folder / "memory.current"
    if not usage_file.exists():
        usage_file = folder / "memory.usage_in_bytes"
    try:
        usage = int(usage_file.read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    cache = int(stat.get("total_cache", stat.get("file", 0)))
    mapped = int(stat.get("total_mapped_file", stat.get("file_mapped", 0)))
    shared = int(stat.get("total_shmem", stat.get("shmem", 0)))  # tmpfs: counted as cache, and cannot be dropped
    return limit - usage + max(cache - mapped - shared, 0)
