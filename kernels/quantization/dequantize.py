"""Values of stored codes, in plain torch: the oracle of every format and every kernel.

Knows formats. Knows nothing of how codes were chosen, nor of models.
"""

import torch

from moeflow.kernels.quantization.formats import FP8_BLOCK, WeightFormat
from moeflow.kernels.quantization.ggml_values import block_values
from moeflow.kernels.quantization.lossless import decode_lossless
from moeflow.kernels.quantization.packing import unpack_codes

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E8M0_BIAS = 127
_E8M0_NAN = 255
_FLOAT64_BIAS, _FLOAT64_MANTISSA = 1023, 52


def dequantize(
    tensors: dict[str, torch.Tensor],
    name: str,
    spec: WeightFormat,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the values of a stored matrix.

    Args:
        tensors: its stored tensors under `name`, `name_scale` and `name_zero`, others are ignored.
        name: of the matrix.
        spec: its format.
        shape: [N, K], without padding.
        dtype: of the result; in float64 the values are exact, else they are computed in float32. Those of GGML's
            blocks are always computed in float32, as GGML defines them.

    Returns:
        [N, K].
    """
    num_rows, in_features = shape
    codes = tensors[name]
    if spec.kind == "float":
        return codes.to(dtype)
    if spec.kind == "ggml":
        return block_values(codes, spec.name).to(dtype)
    if spec.kind == "lossless":
        return decode_lossless(codes, tensors[f"{name}_top"], tensors[f"{name}_escapes"], spec, shape).to(dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    values = _code_values(codes, spec, exact)  # [N, Kp]
    assert values.shape == (num_rows, spec.padded(in_features)), f"{name}: {tuple(values.shape)} for {shape}"
    if spec.has_zeros:
        values -= _spread(tensors[f"{name}_zero"].to(exact), values)
    values *= _spread(_scales(tensors[f"{name}_scale"], spec, exact), values)
    return values[:, :in_features].to(dtype)


def _code_values(codes, spec, exact) -> torch.Tensor:
    """Return the codes' values before zero and scale, [N, Kp]."""
    if spec.kind == "int":
        return unpack_codes(codes, 8).view(torch.int8).to(exact)
    if spec.kind == "uint":
        return unpack_codes(codes, spec.bits).to(exact)
    if spec.kind == "sign":
        return 2 * unpack_codes(codes, 1).to(exact) - 1
    if spec.kind == "fp8":
        return codes.view(torch.float8_e4m3fn).to(exact)
    assert spec.kind == "mxfp4", spec
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    magnitudes = torch.tensor(_E2M1, dtype=exact, device=codes.device)
    return torch.cat((magnitudes, -magnitudes))[nibbles.int()]


def _scales(scale, spec, exact) -> torch.Tensor:
    if spec.kind != "mxfp4":
        return scale.to(exact)
    powers = ((scale.long() + _FLOAT64_BIAS - _E8M0_BIAS) << _FLOAT64_MANTISSA).view(torch.float64)  # exactly
    return powers.masked_fill(scale == _E8M0_NAN, torch.nan).to(exact)


def _spread(numbers, values) -> torch.Tensor:
    """Repeat numbers of groups [N, groups], or of 128 x 128 blocks, for each of the values [N, Kp]."""
    if numbers.shape[0] != values.shape[0]:
        numbers = numbers.repeat_interleave(FP8_BLOCK, dim=0)[: values.shape[0]]
    return numbers.repeat_interleave(values.shape[1] // numbers.shape[1], dim=1)
