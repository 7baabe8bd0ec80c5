"""The dtypes experts may have: safetensors' names and torch's, both ways."""

import torch

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
