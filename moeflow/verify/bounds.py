"""How far moeflow's experts may be from transformers' eager ones, by dtype and by weight format; see docs/verify.md.

Knows numbers. Knows nothing of models.
"""

import torch

from moeflow.kernels.quantization.formats import find_format

_FULL = 1e-5  # of float32 and float64, as of whole models in tests/hf/test_families.py: sums in another order
_ROUNDINGS = 4  # of an expert's values in half precision, on both sides together
_OF_BITS = {8: 0.03, 6: 0.06, 5: 0.12, 4: 0.25, 3: 0.45, 2: 0.8, 1: 0.9}  # of a matrix's norm


def output_bound(dtype: torch.dtype, top_k: int) -> float:
    """Return the largest difference of a token's routed output, as a part of the summed norms of its experts' outputs.

    Args:
        dtype: of the hidden states.
        top_k: experts of a token.
    """
    unit = torch.finfo(dtype).eps / 2  # of one rounding, relative
    return max(_FULL, (_ROUNDINGS + top_k**0.5) * unit)


def weights_bound(form: str) -> float:
    """Return the largest norm of what rounding to a weight format changes in a matrix, as a part of the matrix's norm.

    Args:
        form: name of the format, such as "int4-g64".
    """
    return _OF_BITS[find_format(form).bits]
