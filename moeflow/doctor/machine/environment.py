"""Checks of environment variables that harm, and of the clock.

Knows names and values. Knows nothing of models.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import moeflow
from moeflow.doctor.finding import BROKEN, HARMFUL, Finding
from moeflow.machine.identity import THREAD_VARIABLES, usable_cores

_DAY_S = 86400
_SLOW_CLOCKS = ("hpet", "acpi_pm", "jiffies", "refined-jiffies")


def _is_on(value: str) -> bool:
    return value.strip().lower() not in ("", "0", "false", "no", "off")


def _is_no_count(value: str) -> bool:
    return not all(part.strip().isdecimal() and int(part) > 0 for part in value.split(","))


def _beyond_cores(value: str) -> bool:
    return not _is_no_count(value) and int(value.split(",")[0]) > usable_cores()


class _Harm(NamedTuple):
    """Variables, the values of them that harm, how much, and why."""

    names: tuple[str, ...]
    harms: Callable[[str], bool]
    level: str
    wrong: str
    remedy: str


_HARMS = (
    _Harm(THREAD_VARIABLES, _is_no_count, HARMFUL, "it is no number of threads, and is not obeyed", "set a number"),
    _Harm(THREAD_VARIABLES, _beyond_cores, HARMFUL, "it is more than there are cores: threads wait for each other",
          "unset it, or set the number of cores"),
    _Harm(("OMP_WAIT_POLICY",), lambda value: value.lower() == "passive", HARMFUL,
          "threads sleep between two matrices, and waking them takes longer than a small one", "unset it"),
    _Harm(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), _is_on, HARMFUL, "nothing is downloaded: an id that is not in "
          "the hub's cache is not found", "unset it to download"),
    _Harm(("CUDA_LAUNCH_BLOCKING",), _is_on, HARMFUL, "copies and kernels never run side by side", "unset it"),
    _Harm(("PYTORCH_NO_CUDA_MEMORY_CACHING",), _is_on, HARMFUL, "each tensor on a GPU is allocated anew", "unset it"),
    _Harm(("PYTHONMALLOC",), lambda value: "debug" in value, HARMFUL, "Python checks each allocation", "unset it"),
    _Harm(("MOEFLOW_CACHE", "XDG_CACHE_HOME", "HF_HOME"), lambda value: bool(value) and Path(value).is_file(), BROKEN,
          "it is a file, and a folder is needed there", "set it to a folder"),
)  # fmt: skip


def check_environment(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Look for variables that harm.

    Args:
        environment: names and values, as os.environ has them.
    """
    any_harm = False
    for harm in _HARMS:
        for name in harm.names:
            value = environment.get(name)
            if value is not None and harm.harms(value):
                any_harm = True
                yield Finding(name, f"{name}={value}", harm.level, harm.wrong, harm.remedy)
    if not any_harm:
        yield Finding("environment", "no variable harms")


def check_clock(system: Path = Path("/"), now_s: float | None = None) -> Iterator[Finding]:
    """Look at the clock.

    Args:
        system: root of the system's files.
        now_s: the time, in seconds since 1970; None asks the clock.
    """
    now_s = time.time() if now_s is None else now_s
    installed_s = Path(moeflow.__file__).stat().st_mtime
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now_s))
    try:
        source = (system / "sys/devices/system/clocksource/clocksource0/current_clocksource").read_text().strip()
    except OSError:
        source = ""
    found = f"{shown}, by {source}" if source else shown
    if now_s < installed_s - _DAY_S:
        yield Finding("clock", found, HARMFUL, "it is earlier than moeflow was installed: certificates of the hub seem "
                      "not to be valid yet", "set the clock")  # fmt: skip
    elif source in _SLOW_CLOCKS:
        yield Finding("clock", found, HARMFUL, "to ask it takes a microsecond, and each step does so often",
                      "start the system with clocksource=tsc where the processor allows it")  # fmt: skip
    else:
        yield Finding("clock", found)
