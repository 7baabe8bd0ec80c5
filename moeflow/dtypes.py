"""Names of dtypes in safetensors and in torch, and views of the tensors in a record's raw bytes."""

import torch

from moeflow.core import RecordLayout

FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
TORCH_DTYPES = {**FLOAT_DTYPES, "U8": torch.uint8}  # what a record may hold
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def tensors_of(raw: torch.Tensor, record: RecordLayout) -> dict[str, torch.Tensor]:
    """Return the tensors of the record that lies in `raw`, uint8 [>= record.num_bytes], by name, without a copy."""
    return {
        spec.name: raw[spec.offset : spec.offset + spec.num_bytes].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
        for spec in record.tensors
    }
