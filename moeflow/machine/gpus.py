"""NVIDIA GPUs: the names of those that this process sees, and which of them an option means.

Knows NVML and CUDA_VISIBLE_DEVICES. Knows nothing of torch.
"""

import os
from typing import NamedTuple

from moeflow.errors import ConfigError

_VISIBLE = "CUDA_VISIBLE_DEVICES"


class Gpu(NamedTuple):
    """A GPU of the machine, whether this process may use it or not."""

    name: str
    uuid: str
    num_bytes: int


def gpu_names() -> list[str]:
    """List the GPUs that this process sees by name and memory, in CUDA's order; empty where there is no driver."""
    gpus, visible = machine_gpus(), os.environ.get(_VISIBLE)
    chosen = gpus if visible is None else [gpus[number] for number in visible_numbers(visible, [g.uuid for g in gpus])]
    return [f"{gpu.name}, {gpu.num_bytes / 2**30:.0f} GiB" for gpu in chosen]


def visible_devices() -> str | None:
    """Return the value of CUDA_VISIBLE_DEVICES, None where it is not set."""
    return os.environ.get(_VISIBLE)


def machine_gpus() -> list[Gpu]:
    """List the GPUs of this machine, in the order of the bus."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [
            Gpu(
                pynvml.nvmlDeviceGetName(handle),
                pynvml.nvmlDeviceGetUUID(handle),
                pynvml.nvmlDeviceGetMemoryInfo(handle).total,
            )
            for handle in handles
        ]
    finally:
        pynvml.nvmlShutdown()


def visible_numbers(visible: str, uuids: list[str]) -> list[int]:
    """Return which GPUs a value of CUDA_VISIBLE_DEVICES leaves, in its order, as CUDA reads it.

    The first entry that names no GPU hides itself and all behind it; a GPU that is named twice hides all.

    Args:
        visible: numbers, or beginnings of UUIDs, with commas between.
        uuids: of the machine's GPUs.
    """
    numbers: list[int] = []
    for entry in visible.split(","):
        number = _number_of(entry.strip(), uuids)
        if number is None:
            break
        if number in numbers:
            return []
        numbers.append(number)
    return numbers


def check_gpu(asked: object, number: int, count: int) -> None:
    """Refuse a GPU that is not there.

    Args:
        asked: what the user wrote.
        number: of the GPU that it means.
        count: GPUs that torch sees.

    Raises:
        ConfigError: it is beyond the count, which the message names.
    """
    if number < count:
        return
    visible = visible_devices()
    hidden = "" if visible is None else f", with {_VISIBLE}={visible!r}"
    if not count:
        raise ConfigError(
            f'device={asked!r} was asked for, and torch sees no CUDA GPU (0 of them{hidden}). Use device="cpu" or '
            '"auto", or install a CUDA build of torch where there is a GPU.'
        )
    seen = "1 GPU, cuda:0" if count == 1 else f"{count} GPUs, cuda:0 to cuda:{count - 1}"
    raise ConfigError(f"device={asked!r} is not there: torch sees {seen}{hidden}. Give one of these.")


def _number_of(entry: str, uuids: list[str]) -> int | None:
    if entry.startswith("GPU-"):
        named = [number for number, uuid in enumerate(uuids) if uuid.startswith(entry)]
        return named[0] if len(named) == 1 else None
    digits = entry.removeprefix("+")
    return int(digits) if digits.isdecimal() and int(digits) < len(uuids) else None
