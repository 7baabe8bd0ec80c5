"""Speed of the matrices that are not experts, as the runtime multiplies with them.

Knows kernels. Knows nothing of models.
"""

from itertools import cycle

import torch
import torch.nn.functional as F

from moeflow.kernels.cpu import ops as cpu
from moeflow.kernels.cpu.ahead import is_always_ahead
from moeflow.kernels.cpu.library import library
from moeflow.machine.measuring.memory import beyond_cache_bytes
from moeflow.machine.measuring.timing import median_seconds

_SHAPE = (2048, 2048)
_MANY_TOKENS = 256


def dense_speeds(seconds: float) -> tuple[float, float]:
    """Measure a bfloat16 matrix product.

    Args:
        seconds: for both figures.

    Returns:
        Bytes of weights a second at one token, by moeflow's kernel where it is built; FLOP a second at many tokens, by
        torch's or moeflow's, as models do.
    """
    matrix = (torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0)) / _SHAPE[1] ** 0.5).bfloat16()
    weights = [matrix.clone() for _ in range(max(-(-beyond_cache_bytes() // matrix.nbytes), 2))]
    token, tokens = (torch.randn(count, _SHAPE[1]).bfloat16() for count in (1, _MANY_TOKENS))
    multiply = F.linear if library() is None else cpu.linear
    with torch.inference_mode():
        turn = cycle(weights)
        one = median_seconds(lambda: multiply(token, next(turn), None), seconds / 2)
        multiply = multiply if is_always_ahead(matrix.dtype) else F.linear
        many = median_seconds(lambda: multiply(tokens, weights[0], None), seconds / 2)
    return matrix.nbytes / one, 2 * _MANY_TOKENS * matrix.numel() / many
