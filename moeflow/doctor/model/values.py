"""NaN and infinity among the values of a tensor, counted by bit patterns.

Knows dtypes. Knows nothing of files.
"""

from typing import NamedTuple

import numpy as np


class Bad(NamedTuple):
    """How many values are NaN, and how many are infinite."""

    nan: int
    infinite: int

    def __str__(self) -> str:
        return " and ".join(
            f"{count:,} {name}" for count, name in ((self.nan, "NaN"), (self.infinite, "infinite")) if count
        )


# safetensors dtype -> unsigned integer of its size, bits that are all set in a special value, bits that tell NaN by.
_FORMS = {
    "F64": (np.uint64, 0x7FF << 52, (1 << 52) - 1),
    "F32": (np.uint32, 0xFF << 23, (1 << 23) - 1),
    "BF16": (np.uint16, 0xFF << 7, (1 << 7) - 1),
    "F16": (np.uint16, 0x1F << 10, (1 << 10) - 1),
    "F8_E5M2": (np.uint8, 0x7C, 0x03),
    "F8_E4M3": (np.uint8, 0x7F, 0x7F),  # it has no infinity
    "F8_E8M0": (np.uint8, 0xFF, 0xFF),  # a scale: a power of two
}


def bad_values(raw: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Find what is no number.

    Args:
        raw: uint8 [n], whole values.
        dtype: safetensors name; integers have no such values.

    Returns:
        Places of NaN, and places of infinity, in values.
    """
    nothing = np.empty(0, np.int64)
    if dtype not in _FORMS:
        return nothing, nothing
    kind, special, fraction = _FORMS[dtype]
    bits = raw.view(kind)
    found = np.flatnonzero((bits & kind(special)) == kind(special))
    if not len(found):
        return nothing, nothing
    is_nan = (bits[found] & kind(fraction)) != 0
    return found[is_nan], found[~is_nan]
