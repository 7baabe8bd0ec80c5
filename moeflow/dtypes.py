"""The dtypes experts may have: safetensors' names and torch's, both ways."""

import torch

FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
TORCH_DTYPES = {**FLOAT_DTYPES, "U8": torch.uint8}  # what a record may hold
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
