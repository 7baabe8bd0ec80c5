"""The speeds of a machine as plain numbers, and their JSON.

Knows names and ranges of the figures. Knows nothing of how they are measured.
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from moeflow.errors import ConfigError
from moeflow.formatting import brief

FORMAT = 2
MANY_TOKENS = 256  # of an expert, at which `kernel_flops` is measured


@dataclass(frozen=True)
class MachineProfile:
    """What a machine does in a second. Rates are in bytes or FLOP a second, times in seconds.

    Args:
        hardware: what was measured: processor, cores, memory, instruction set, GPUs, limits, moeflow's version.
        threads: of torch and the kernels, in all figures but memory_read's.
        memory_read: threads -> bytes a second that kernels read from memory.
        memory_touch: bytes a second at which fresh memory is first written, as the experts' slots are taken.
        first_check: "checksum", "lossless" -> bytes a second of a core that compares a packed expert with its checksum,
            and looks for codes that name no value, when it reads the expert for the first time.
        disk: the file system that was read: its mount point, type and device.
        disk_read: bytes of an expert -> bytes a second, past the page cache, as many in flight as the runtime has.
        disk_read_alone: the same with one in flight.
        kernel_read: weight format -> tokens of an expert (1, 4, 16, 64) -> bytes of weights a second, from memory.
        kernel_flops: weight format -> FLOP a second of experts with `MANY_TOKENS`.
        dense_read: bytes a second of the matrices that are not experts, at one token.
        dense_flops: FLOP a second of the same, at many tokens.
        layer_s: "native", "python" -> seconds that a layer of a decode step takes beside its weights; no "native"
            where no step runs natively. "missing": what comes on top for an expert that is missed, beside its reading.
        step_s: the same of what a step takes once, whatever its layers.
        copy: "pinned", "pageable" -> bytes a second from memory to the GPU; empty without one.
        process_bytes: resident memory of a process that has loaded a model without weights.
        others_load: share of the processors that other processes took meanwhile; 0 where that is not known.
        seconds: that the measuring was given.
        format: version of this form.
    """

    hardware: str
    threads: int
    memory_read: dict[int, float]
    memory_touch: float
    first_check: dict[str, float]
    disk: str
    disk_read: dict[int, float]
    disk_read_alone: dict[int, float]
    kernel_read: dict[str, dict[int, float]]
    kernel_flops: dict[str, float]
    dense_read: float
    dense_flops: float
    layer_s: dict[str, float]
    step_s: dict[str, float]
    copy: dict[str, float] = field(default_factory=dict)
    process_bytes: int = 0
    others_load: float = 0.0
    seconds: float = 20.0
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON has them: all keys are texts."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_dict(found: Any) -> "MachineProfile":
        """Build a profile from what `to_dict` returned.

        Raises:
            ConfigError: another version's, a figure that is missing, or one that is no positive number.
        """
        version = found.get("format") if isinstance(found, dict) else None
        if version != FORMAT:
            raise _malformed(f"it has format {brief(version)}, this moeflow reads {FORMAT}")
        names = {one.name for one in fields(MachineProfile)}
        if set(found) != names:
            raise _malformed(f"these figures are missing or unknown: {brief(sorted(set(found) ^ names))}")
        try:
            return MachineProfile(
                hardware=_text(found["hardware"]),
                threads=_count(found["threads"]),
                memory_read=_by_number(found["memory_read"]),
                memory_touch=_rate(found["memory_touch"]),
                first_check=_by_name(found["first_check"]),
                disk=_text(found["disk"]),
                disk_read=_by_number(found["disk_read"]),
                disk_read_alone=_by_number(found["disk_read_alone"]),
                kernel_read={_text(name): _by_number(rates) for name, rates in found["kernel_read"].items()},
                kernel_flops=_by_name(found["kernel_flops"]),
                dense_read=_rate(found["dense_read"]),
                dense_flops=_rate(found["dense_flops"]),
                layer_s=_by_name(found["layer_s"]),
                step_s=_by_name(found["step_s"]),
                copy=_by_name(found["copy"]),
                process_bytes=_count(found["process_bytes"]),
                others_load=_share(found["others_load"]),
                seconds=_rate(found["seconds"]),
            )
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise _malformed(brief(error)) from None


def _malformed(why: str) -> ConfigError:
    return ConfigError(f"this is no profile of a machine: {why}. Measure it again: moeflow doctor --measure.")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a whole number of 0 or more")
    return value


def _rate(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is not a number above 0")
    return float(value)


def _share(value: Any) -> float:
    return 0.0 if value == 0 else _rate(value)


def _by_number(rates: dict[str, Any]) -> dict[int, float]:
    return {_count(int(number)): _rate(rate) for number, rate in rates.items()}


def _by_name(rates: dict[str, Any]) -> dict[str, float]:
    return {_text(name): _rate(rate) for name, rate in rates.items()}
