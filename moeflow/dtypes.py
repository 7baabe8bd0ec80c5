"""Names of dtypes in safetensors, torch and options, views of the tensors in a record's raw bytes, and small copies."""

from typing import Any

import torch

from moeflow.core import RecordLayout
from moeflow.errors import ConfigError

FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
TORCH_DTYPES = {**FLOAT_DTYPES, "U8": torch.uint8, "U16": torch.uint16}  # what a record may hold
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_SERIAL_PIECE = 16384  # numbers; torch shares copies from 32,768 on among threads
_OTHER_NAMES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
    **{name.lower(): dtype for name, dtype in FLOAT_DTYPES.items()},
}


def parse_dtype(value: Any, name: str, *, floats_only: bool = True) -> torch.dtype:
    """Return the dtype that a torch dtype or one of its names means: "bfloat16", "torch.bfloat16", "bf16", "half".

    Args:
        value: as the user or a config gives it.
        name: of the option or field, for errors.
        floats_only: refuse dtypes that a model does not compute in: integers, and floats of 8 bits.

    Raises:
        ConfigError: no dtype, or one that is refused.
    """
    found = value
    if isinstance(value, str):
        short = value.removeprefix("torch.").lower()
        found = _OTHER_NAMES.get(short) or getattr(torch, short, None)
    if not isinstance(found, torch.dtype) or (floats_only and found not in FLOAT_DTYPES.values()):
        raise ConfigError(
            f"{name} is {value!r:.80}; a model computes in float32, bfloat16, float16 or float64. Give one of them."
        )
    return found


def tensors_of(raw: torch.Tensor, record: RecordLayout) -> dict[str, torch.Tensor]:
    """Return the tensors of the record that lies in `raw`, uint8 [>= record.num_bytes], by name, without a copy."""
    return {
        spec.name: raw[spec.offset : spec.offset + spec.num_bytes].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
        for spec in record.tensors
    }


def serial_copy(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a copy of a tensor of any shape, in another float dtype where one is given, made by the calling thread.

    For the logits of a few tokens: where torch shares a copy among threads, it waits for all of them. While another
    process holds a core, one of them is late by a time slice, and 20 microseconds become several milliseconds.
    """
    if tensor.device.type != "cpu":
        return tensor.to(dtype or tensor.dtype, copy=True)
    made = torch.empty(tensor.shape, dtype=dtype or tensor.dtype)
    for to, part in zip(made.view(-1).split(_SERIAL_PIECE), tensor.reshape(-1).split(_SERIAL_PIECE), strict=True):
        to.copy_(part)
    return made
