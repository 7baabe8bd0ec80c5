"""A weight matrix in a format: checked, cut into groups, given a grid and codes by a method, packed.

Knows formats and methods. Knows nothing of models or files.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from moeflow.errors import CheckpointError, ConfigError
from moeflow.kernels.formats import WRITABLE, WeightFormat
from moeflow.kernels.packing import pack_codes
from moeflow.kernels.rounding import encode, range_grid

METHODS = ("rtn",)
_PART_WEIGHTS = 1 << 17  # worked on at a time: what a method needs in between stays in the cache


def quantize(
    weight: torch.Tensor,
    spec: WeightFormat,
    *,
    method: str = "rtn",
    calibration: torch.Tensor | None = None,
    name: str = "weight",
) -> dict[str, torch.Tensor]:
    """Store a matrix in a format.

    Args:
        weight: [N, K], any float dtype and strides.
        spec: a format that can be written, or a float format, to which the weight is cast.
        method: "rtn" rounds to the nearest value of the group's range.
        calibration: not used by these methods.
        name: of the matrix, in the answer and in errors.

    Returns:
        `name`, and `name_scale` and `name_zero` where the format has them, in the order they are stored.

    Raises:
        CheckpointError: a weight is NaN or infinite.
        ConfigError: an unknown method, or a format that is only read.
    """
    if method not in METHODS:
        raise ConfigError(f"{method!r} is not a method of quantisation. Allowed: {', '.join(METHODS)}.")
    if spec.kind == "float":
        return {name: _checked(weight, name).to(getattr(torch, spec.name)).contiguous()}
    if spec.name not in WRITABLE:
        raise ConfigError(
            f"{name} cannot be quantised to {spec.name}: it is only read from published checkpoints. "
            f"Allowed: {', '.join(WRITABLE)}."
        )
    mask = _padding_mask(weight.shape[1], spec)
    parts = [_round_part(groups, spec, mask) for groups in _row_parts(_checked(weight, name), spec)]
    codes, scale, zero = (None if found[0] is None else torch.cat(found) for found in zip(*parts, strict=True))
    stored = {name: codes, f"{name}_scale": scale}
    return stored | ({f"{name}_zero": zero} if zero is not None else {})


def _checked(weight, name) -> torch.Tensor:
    finite = torch.isfinite(weight)
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        raise CheckpointError(
            f"{name} has {weight[row, column].item()} in row {row}, column {column}. Weights must be finite numbers: "
            "the checkpoint is damaged or was saved from a diverged training; fetch it again."
        )
    return weight


def _padding_mask(in_features, spec) -> torch.Tensor:
    """Return which places of a row hold weights, [groups, group_size], float32: 1 there, 0 in the padding."""
    columns = torch.arange(spec.padded(in_features)) < in_features
    return columns.float().unflatten(0, (spec.num_groups(in_features), -1))


def _row_parts(weight, spec) -> Iterator[torch.Tensor]:
    """Yield some rows of the weight at a time, [rows, groups, group_size], float32, padding 0."""
    num_rows, in_features = weight.shape
    padded = spec.padded(in_features)
    rows = max(_PART_WEIGHTS // padded, 1)
    limit = torch.finfo(torch.float32).max
    for first in range(0, num_rows, rows):
        part = weight[first : first + rows].float().clamp(-limit, limit)
        yield F.pad(part, (0, padded - in_features)).unflatten(1, (spec.num_groups(in_features), -1))


def _round_part(groups, spec, mask):
    grid = range_grid(groups, spec, mask)
    return _stored(encode(groups, grid, spec), grid, spec)


def _stored(codes, grid, spec):
    """Return packed codes, scale and zero (or None) as they are stored."""
    whole = codes.flatten(1).to(torch.int8).view(torch.uint8)
    zero = None if grid.zero is None else grid.zero.squeeze(-1).half()
    return pack_codes(whole, spec.bits), grid.scale.squeeze(-1).half(), zero
