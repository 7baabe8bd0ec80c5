"""Where moeflow's linear is ahead of torch's: by the number of tokens, the dtype and the processor.

Knows instruction sets. Knows nothing of matrices.
"""

import torch

from moeflow.kernels.cpu.library import instruction_set

FEW_TOKENS = 16  # up to here the row-by-row kernel is ahead of every product of torch's


def is_always_ahead(dtype: torch.dtype) -> bool:
    """Whether `ops.linear` is ahead of torch's product on this processor with any number of tokens.

    torch has fast products of 16-bit floats only where it has instructions for them; else `linear` is five times as
    fast (docs/kernels.md).

    Args:
        dtype: of the weight.
    """
    known = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in known and instruction_set() not in (None, "portable") and not known[dtype]()
