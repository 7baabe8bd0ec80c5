"""Damage to JSON files, drawn by hypothesis: odd values, lost keys, nesting, lost and foreign bytes."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

ODD = (
    None, True, False, 0, -1, 1, 3, 7, 1000, 2**31, 2**63, 10**9, 10**12, 10**30, 0.5, -0.5, 8.0, 1e308,
    float("nan"), float("inf"), "", "8", "hot", "bf16", "silu", "\udcff", "x" * 5000, [], [1], [None], ["a", 5],
    [[[]]], {}, {"a": 1}, {"": None}, {"type": "Newer"}, {"content": 5},
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, good: dict[str, Any]) -> bytes:
    """Draw the bytes of a damaged file.

    Args:
        draw: hypothesis's.
        good: what the file held.
    """
    changed: Any = copy.deepcopy(good)
    for _ in range(draw(st.integers(0, 2))):
        if not changed:
            break
        holder, key = changed, draw(st.sampled_from(list(changed)))
        while isinstance(holder[key], (dict, list)) and holder[key] and draw(st.booleans()):
            holder = holder[key]
            key = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
        how = draw(st.sampled_from(["replace", "replace", "replace", "delete", "wrap", "deep", "swap"]))
        if how == "replace":
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif how == "delete":
            del holder[key]
        elif how == "wrap":
            holder[key] = draw(st.sampled_from([[holder[key]], {"a": holder[key]}, str(holder[key])]))
        elif how == "swap":
            other = draw(st.sampled_from(list(good)))
            holder[key] = copy.deepcopy(good[other])
        else:
            for _ in range(500):
                holder[key] = [holder[key]]
    written = json.dumps(changed).encode()
    how = draw(st.sampled_from(["whole"] * 8 + ["cut", "byte", "mark", "utf16", "deep"]))
    if how == "cut":
        return written[: draw(st.integers(0, len(written)))]
    if how == "byte":
        at = draw(st.integers(0, len(written) - 1))
        return written[:at] + bytes([draw(st.integers(0, 255))]) + written[at + 1 :]
    if how == "mark":
        return b"\xef\xbb\xbf" + written
    if how == "utf16":
        return written.decode().encode("utf-16")
    return b"[" * 50_000 + written if how == "deep" else written
