"""An expert's values as moeflow's store reads them: floats as they are, codes of a weight format by their formula."""

import numpy as np
import torch

from moeflow.checkpoint.float_source import parameters_of
from moeflow.checkpoint.store import ExpertStore
from moeflow.core import PAGE_BYTES, ExpertKey, RecordLayout, align_up
from moeflow.dtypes import tensors_of
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import find_format, is_lossless


class StoredWeights:
    """The experts behind a store.

    Args:
        store: open.
        dtype: that the values get.
        transposed: [num_layers], whether the layer's module has its matrices as [in, out].
    """

    def __init__(self, store: ExpertStore, dtype: torch.dtype, transposed: list[bool]) -> None:
        self._store, self._dtype, self._transposed = store, dtype, transposed

    def form(self, layer: int, expert: int, name: str) -> str | None:
        """Return the weight format that a parameter's values were rounded to; None where every bit was kept.

        Args:
            layer: number among the MoE layers.
            expert: its number.
            name: of the parameter, as the module has it.
        """
        record = self._record(layer, expert)
        form = next((matrix.format for matrix in record.matrices if matrix.name == name), None)
        return None if form is None or is_lossless(record) or find_format(form).kind == "float" else form

    def file(self, layer: int, expert: int) -> str:
        """Return the file that an expert begins in."""
        return str(self._store.file_of(ExpertKey(layer, expert)))

    def read(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """Return one expert's parameters, as the module has them; raises ExpertReadError as the store does."""
        record = self._record(layer, expert)
        raw = np.empty(align_up(record.num_bytes, PAGE_BYTES), np.uint8)
        self._store.read(ExpertKey(layer, expert), raw)
        if is_lossless(record) or not record.matrices:
            return {name: value.to(self._dtype) for name, value in parameters_of(torch.from_numpy(raw), record).items()}
        return self._decoded(tensors_of(torch.from_numpy(raw), record), record, self._transposed[layer])

    def parameter(self, layer: int, name: str, expert: int) -> torch.Tensor:
        """Return one parameter of an expert, as the module has it; otherwise as `read`."""
        return self.read(layer, expert)[name]

    def close(self) -> None:
        """Close the files."""
        self._store.close()

    def _decoded(
        self, stored: dict[str, torch.Tensor], record: RecordLayout, is_transposed: bool
    ) -> dict[str, torch.Tensor]:
        found, parts = {}, set()
        for name, form, shape in record.matrices:
            spec = find_format(form)
            parts |= {part for part, _, _ in spec.tensors(name, shape)}
            value = dequantize(stored, name, spec, shape, self._dtype)
            found[name] = value.T.contiguous() if is_transposed else value
        return found | {name: value.to(self._dtype) for name, value in stored.items() if name not in parts}

    def _record(self, layer: int, expert: int) -> RecordLayout:
        return self._store.layers[layer].layout.record_of(expert)
