"""Round-to-nearest: the grid of values a group may take, and the code of each weight on it.

A grid holds the float16 numbers that will be stored, so that codes are chosen against what a kernel multiplies with.

Knows groups of weights. Knows nothing of packing or files.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from moeflow.kernels.quantization.formats import WeightFormat

_MAX_FLOAT16 = 65504.0
_MIN_FLOAT16 = 2.0**-24  # positive, subnormal
INT8_LIMIT = 127


class Grid(NamedTuple):
    """The values that groups may take: float16 numbers, held in float32.

    Args:
        scale: [..., 1].
        zero: [..., 1], asymmetric formats only.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Grid":
        """Return the grid with a function applied to its scale and zero."""
        return Grid(function(self.scale), None if self.zero is None else function(self.zero))


def largest_weight(spec: WeightFormat) -> float:
    """Return the largest magnitude that a group can hold with both signs; beyond it weights saturate."""
    if spec.kind == "uint":
        return _MAX_FLOAT16 * (2**spec.bits - 1) / 2
    return _MAX_FLOAT16 * (INT8_LIMIT if spec.kind == "int" else 1)


def round_scale(scale: torch.Tensor) -> torch.Tensor:
    """Return the positive float16 number nearest to each scale, as float32."""
    return scale.clamp(_MIN_FLOAT16, _MAX_FLOAT16).half().float()


def round_zero(zero: torch.Tensor) -> torch.Tensor:
    """Return the float16 number nearest to each zero, as float32."""
    return zero.clamp(-_MAX_FLOAT16, _MAX_FLOAT16).half().float()


def range_grid(groups: torch.Tensor, spec: WeightFormat, importance: torch.Tensor) -> Grid:
    """Fit the grid to each group's range: every weight is within half a step of a value.

    Args:
        groups: [..., group_size], float32, none beyond `largest_weight`; padding is 0.
        spec: the format.
        importance: [groups, group_size], how much each weight counts in a mean; 0 in the padding.

    Returns:
        scale and zero of [..., 1].
    """
    if spec.kind == "sign":
        shares = importance / importance.sum(-1, keepdim=True)
        return Grid((groups.abs() * shares).sum(-1, keepdim=True).clamp(max=_MAX_FLOAT16).half().float())
    if spec.kind == "int":
        largest = groups.abs().amax(-1, keepdim=True)
        return Grid(_round_up(largest / INT8_LIMIT))
    levels = 2**spec.bits - 1
    low = groups.amin(-1, keepdim=True).clamp(max=0)  # with 0 in it, the range has a zero that float16 holds
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    scale = _round_up((high - low) / levels)
    return Grid(scale, round_zero(-low / scale))


def encode(groups: torch.Tensor, grid: Grid, spec: WeightFormat) -> torch.Tensor:
    """Return the code of the value nearest to each weight.

    Args:
        groups: [..., group_size], float32.
        grid: of these groups.
        spec: the format.

    Returns:
        whole numbers in float32, the shape of `groups`: -127 .. 127 in a symmetric format, else from 0 up.
    """
    if spec.kind == "sign":
        return (groups >= 0).to(groups.dtype)
    codes = groups / grid.scale
    if grid.zero is None:
        return codes.round_().clamp_(-INT8_LIMIT, INT8_LIMIT)
    return codes.add_(grid.zero).round_().clamp_(0, 2**spec.bits - 1)


def decode(codes: torch.Tensor, grid: Grid, spec: WeightFormat) -> torch.Tensor:
    """Return the values of codes, float32, in the codes' shape."""
    if spec.kind == "sign":
        return (2 * codes - 1) * grid.scale
    return (codes if grid.zero is None else codes - grid.zero) * grid.scale


def _round_up(scale) -> torch.Tensor:
    """Return the positive float16 number not below each scale, as float32: the end of a range is not cut off."""
    half = scale.clamp(_MIN_FLOAT16, _MAX_FLOAT16).half()
    above = (half.view(torch.int16) + 1).view(torch.half)
    return torch.where(half.float() < scale, above, half).clamp(max=_MAX_FLOAT16).float()
