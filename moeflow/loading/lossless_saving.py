"""What storing experts without loss would save, by the exponents of a few of them.

Knows sources of experts. Knows nothing of what is told about a model else.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from moeflow.checkpoint.layer_source import LayerSource
from moeflow.checkpoint.lossless_source import WORTH_IT, lossless_layout
from moeflow.checkpoint.reading.file_stamp import FileStamp
from moeflow.checkpoint.store import ExpertStore
from moeflow.core import ExpertKey, LayerLayout, RecordLayout
from moeflow.dtypes import tensors_of
from moeflow.kernels.cpu.lossless import count_escapes

_EXPERTS_READ = 4
_DTYPES = ("F32", "BF16", "F16")
_F16_SHARE = 15 / 16  # sign, 10 bits of mantissa and a code of 4 bits, of 16


class LosslessSaving(NamedTuple):
    """What the experts would take.

    Args:
        dtype: safetensors name of what they are stored in.
        share: of their bytes that they would take; 1 where too little would be saved.
        experts_read: by whose exponents; 0 where only bits were counted, without escapes.
        built: whether there is a format for the dtype; only for BF16.
    """

    dtype: str
    share: float
    experts_read: int
    built: bool


def lossless_saving(
    files: list[Path], stamps: list[FileStamp], sources: list[LayerSource], transposed: list[bool]
) -> LosslessSaving | None:
    """Estimate the saving from a few experts of layers far apart.

    Args:
        files: that the piece tables number.
        stamps: of the files when their headers were read.
        sources: [num_layers].
        transposed: [num_layers], whether the module stores its matrices [in, out].

    Returns:
        The estimate; None for experts in a weight format, in float64 or [in, out].

    Raises:
        CheckpointError: a file changed.
        ExpertReadError: the disk failed, or a record is corrupt.
    """
    record = sources[0].layout.record
    dtype = record.tensors[0].dtype
    if any(source.layout.variants or source.layout.record.matrices for source in sources):
        return None
    if any(transposed) or any(spec.dtype not in _DTYPES or spec.dtype != dtype for spec in record.tensors):
        return None
    if dtype == "F16":
        return LosslessSaving(dtype, _F16_SHARE, 0, built=False)
    shares = []
    store = ExpertStore(files, sources, stamps=stamps)
    try:
        for number in range(count := min(_EXPERTS_READ, len(sources))):
            layer = number * len(sources) // count
            key = ExpertKey(layer, number % sources[layer].layout.num_experts)
            shares.append(_share(store, sources[layer].layout, key))
    finally:
        store.close()
    return LosslessSaving(dtype, sum(shares) / count, count, built=dtype == "BF16")


def _share(store: ExpertStore, layout: LayerLayout, key: ExpertKey) -> float:
    """Return the share of its bytes that one expert would take."""
    raw = np.empty(layout.record.num_bytes, np.uint8)
    store.read(key, raw)
    matrices = {
        name: value for name, value in tensors_of(torch.from_numpy(raw), layout.record).items() if value.dim() == 2
    }
    counts = [count_escapes(_exponents(value)) for value in matrices.values()]
    floats = LayerLayout(layout.name, 1, _in_bfloat16(layout.record))
    found = lossless_layout(floats, list(matrices), [counts])
    if layout.record.tensors[0].dtype == "BF16":
        return found.record.num_bytes / layout.record.num_bytes
    # What is kept beside the exponents is 16 bits longer.
    wide = sum(value.numel() for value in matrices.values()) * 2
    share = (found.record.num_bytes + wide) / layout.record.num_bytes
    return share if found is not floats and share < WORTH_IT else 1.0


def _exponents(value: torch.Tensor) -> torch.Tensor:
    """Return a bfloat16 matrix of the same exponents: the upper half of float32, not rounded."""
    if value.dtype == torch.bfloat16:
        return value
    return (value.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def _in_bfloat16(record: RecordLayout) -> RecordLayout:
    return RecordLayout.pack([(spec.name, "BF16", spec.shape) for spec in record.tensors])
