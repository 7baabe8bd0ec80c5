"""The bfloat16 matrices of all experts of a model, one after another, and its layers' sources."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from moeflow import load_moe
from moeflow.checkpoint.lossless_source import matrices_of
from moeflow.core import ExpertKey
from moeflow.dtypes import tensors_of


class ExpertMatrix(NamedTuple):
    """One matrix of an expert.

    Args:
        layer: its number.
        expert: its number in the layer.
        name: in the record.
        weight: [N, K], bfloat16; overwritten by the next matrix.
    """

    layer: int
    expert: int
    name: str
    weight: torch.Tensor


def expert_matrices(folder: Path) -> Iterator[ExpertMatrix]:
    """Read every expert of a checkpoint, and give its matrices that can be stored without loss."""
    model = load_moe(folder, device="cpu", predictor=None, step="python")
    try:
        store = model.moeflow.store
        for layer, source in enumerate(store.layers):
            record = source.layout.record
            names = matrices_of(source.layout, is_transposed=False)
            raw = np.empty(record.num_bytes, np.uint8)
            for expert in range(source.layout.num_experts):
                store.read(ExpertKey(layer, expert), raw)
                tensors = tensors_of(torch.from_numpy(raw), record)
                for name in names:
                    yield ExpertMatrix(layer, expert, name, tensors[name])
    finally:
        model.moeflow.close()
