"""Memory sizes as people write them: "6GiB", "25%" or a number of bytes."""

import re

from moeflow.errors import ConfigError

MemorySize = int | float | str

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}iB"] = 1024**_power
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*|%)\s*$")


def parse_memory(value: MemorySize, *, name: str, whole_bytes: int) -> int:
    """Turn "6GiB", "600MB", "25%" or a number of bytes into bytes.

    Args:
        value: what the user wrote.
        name: the option's name, for the message.
        whole_bytes: what 100 % stands for: the bytes of all routed experts.

    Raises:
        ConfigError: not a size.
    """
    allowed = f'{name} takes bytes, "6GiB", "600MB", "25%" (of all experts) or "auto"'
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ConfigError(f"{name}={value!r} is not a memory size: {allowed}.")
    match = _SIZE.match(str(value))
    if not match:
        raise ConfigError(f"{name}={value!r} is not a memory size: {allowed}.")
    number, unit = float(match[1]), match[2]
    if unit == "%":
        if number > 100:
            raise ConfigError(f"{name}={value!r} is more than all experts: give at most 100%.")
        return int(number * whole_bytes / 100)
    if unit not in _UNITS:
        known = ", ".join(unit for unit in _UNITS if unit)
        raise ConfigError(f"{name}={value!r} has an unknown unit {unit!r}. Units: {known}, %.")
    return int(number * _UNITS[unit])


def parse_bytes(value: MemorySize, *, name: str) -> int:
    """Turn bytes of what has no whole that a share could be of, as people write them, into bytes.

    Raises:
        ConfigError: not a size, or a share.
    """
    if isinstance(value, str) and value.endswith("%"):
        raise ConfigError(f'{name}={value!r} is a share of nothing: give bytes, "2GiB" or "auto".')
    return parse_memory(value, name=name, whole_bytes=0)


def parse_kv_memory(value: MemorySize) -> int:
    """Turn bytes of keys and values as people write them into bytes.

    Raises:
        ConfigError: not a size, or a share.
    """
    return parse_bytes(value, name="kv_memory")
