"""Layout of a routing trace's rows: the model and the fields (docs/trace_format.md).

Knows nothing of files. Needs numpy, not torch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeflow.core import align_up

PREFILL, DECODE = 0, 1  # phases
_ROW_ALIGNMENT_BYTES = 8


@dataclass(frozen=True)
class TraceFormat:
    """The model and the rows of a trace.

    Args:
        experts_per_layer: [L], routed experts of each MoE layer.
        top_k: K, ranks a row holds.
        fingerprint: of the model, see hf.fingerprint.model_fingerprint; other sources use the model's name.
        has_weights: whether rows hold the ranks' weights.
        ranked: whether rank 0 has the highest weight; else the order of the ranks says nothing.
        lookahead: (D, M), layers ahead and expert ids of each, as predicted at every layer; None without.
        source: free text, where the rows come from.
    """

    experts_per_layer: tuple[int, ...]
    top_k: int
    fingerprint: str
    has_weights: bool = True
    ranked: bool = True
    lookahead: tuple[int, int] | None = None
    source: str = ""

    @property
    def num_layers(self) -> int:
        return len(self.experts_per_layer)

    @property
    def num_experts(self) -> int:
        """The largest number of experts in a layer."""
        return max(self.experts_per_layer)

    @property
    def none(self) -> int:
        """The expert id that stands for none: 255, or 65535 where 255 may be an expert."""
        return 255 if self.num_experts <= 255 else 65535

    @property
    def dtype(self) -> np.dtype:
        """The structured dtype of a row: two-byte fields on even offsets, a multiple of 8 bytes in all."""
        ids, ranks = ("u1" if self.none == 255 else "<u2"), (self.num_layers, self.top_k)
        fields: list[tuple[str, str, tuple[int, ...]]] = [("token_id", "<i4", ()), ("sequence", "<u4", ())]
        if self.has_weights:
            fields.append(("weights", "<f2", ranks))
        fields.append(("experts", ids, ranks))
        if self.lookahead is not None:
            fields.append(("lookahead", ids, (self.num_layers, *self.lookahead)))
        fields.append(("phase", "u1", ()))
        offsets, end = [], 0
        for _, code, shape in fields:
            offsets.append(end)
            end += np.dtype((code, shape)).itemsize
        return row_dtype(
            [(name, code, shape, offset) for (name, code, shape), offset in zip(fields, offsets, strict=True)],
            align_up(end, _ROW_ALIGNMENT_BYTES),
        )

    def row_difference(self, other: "TraceFormat") -> str | None:
        """Name the first thing that keeps rows of `other` out of a file of this format; None when they fit."""
        for name in ("fingerprint", "experts_per_layer", "top_k", "has_weights", "ranked", "lookahead"):
            if getattr(self, name) != getattr(other, name):
                return f"{name} is {_short(getattr(self, name))} there and {_short(getattr(other, name))} here"
        return None


def row_dtype(fields: list[tuple[str, str, tuple[int, ...], int]], row_bytes: int) -> np.dtype:
    """Return the structured dtype of rows of so many bytes with these fields: (name, numpy type, shape, offset)."""
    return np.dtype(
        {
            "names": [name for name, *_ in fields],
            "formats": [(code, shape) for _, code, shape, _ in fields],
            "offsets": [offset for *_, offset in fields],
            "itemsize": row_bytes,
        }
    )


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "..."
