"""Combine: the weighted sum of each token's expert outputs, in float32, always in the order of K."""

import torch

import triton
import triton.language as tl
from moeflow.kernels.triton.dequantize import rounded

_BLOCK = 256


def combine_pairs(outputs: torch.Tensor, top_k_weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum each token's expert outputs by router weight.

    Args:
        outputs: [T * K, H] float32, contiguous; zeros where there is no expert.
        top_k_weights: [T, K].
        dtype: of the result.

    Returns:
        [T, H].
    """
    num_tokens, top_k = top_k_weights.shape
    width = outputs.shape[1]
    sums = torch.empty(num_tokens, width, dtype=dtype, device=outputs.device)
    if sums.numel() == 0:
        return sums
    with torch.cuda.device_of(outputs):
        _combine[(num_tokens, triton.cdiv(width, _BLOCK))](
            outputs,
            top_k_weights.contiguous(),
            sums,
            width,
            TOP_K=top_k,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return sums


@triton.jit(do_not_specialize_on_alignment=("weights",))
def _combine(outputs, weights, sums, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = columns < width
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(TOP_K):
        weight = tl.load(weights + token * TOP_K + k).to(tl.float32)
        total += weight * tl.load(outputs + (token * TOP_K + k) * width + columns, mask=here, other=0.0)
    tl.store(sums + token * width + columns, rounded(total, sums.dtype.element_ty), mask=here)
