"""Quantisation of a weight matrix: check it, cut it into groups, choose grid and codes by a method, pack.

Knows formats and methods. Knows nothing of models or files.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from moeflow.errors import CheckpointError, ConfigError
from moeflow.kernels.quantization.formats import WRITABLE, WeightFormat
from moeflow.kernels.quantization.gptq import prepare_hessian, round_with_hessian
from moeflow.kernels.quantization.hqq import fit_grid
from moeflow.kernels.quantization.packing import pack_codes
from moeflow.kernels.quantization.rounding import Grid, encode, largest_weight, range_grid

METHODS = ("rtn", "hqq", "gptq")
# Weights in one part, so that a method's intermediate values stay in the cache. GPTQ pays for each part anew.
_PART_WEIGHTS = {"rtn": 1 << 17, "hqq": 1 << 17, "gptq": 1 << 21}

# groups [rows, groups, group_size] -> their codes and grid
Rounding = Callable[[torch.Tensor], tuple[torch.Tensor, Grid]]


def quantize(
    weight: torch.Tensor,
    spec: WeightFormat,
    *,
    method: str = "rtn",
    calibration: torch.Tensor | None = None,
    name: str = "weight",
) -> dict[str, torch.Tensor]:
    """Store a matrix in a format.

    "rtn" and "hqq" give the same bits for any number of threads, "gptq" as far as torch's products do.

    Args:
        weight: [N, K], any float dtype and strides.
        spec: a format that can be written, or a float format, to which the weight is cast.
        method: "rtn" rounds to the nearest value of the group's range; "hqq" fits the values to the group's weights;
            "gptq" also compensates one column's error in the others, where there is calibration, else is "hqq".
        calibration: [tokens, K], inputs of the layer, or [K, K], their X^T X; read by "gptq" only.
        name: of the matrix, in the result and in errors.

    Returns:
        `name`, and `name_scale` and `name_zero` where the format has them, in the order they are stored.

    Raises:
        CheckpointError: a weight is NaN or infinite.
        ConfigError: an unknown method, a format that is only read, or calibration of another layer.
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
    round_part = _rounding(spec, method, calibration, weight.shape[1], name)
    parts = [
        _stored(*round_part(groups), spec) for groups in _row_parts(_checked(weight, name), spec, _PART_WEIGHTS[method])
    ]
    codes, scale, zeros = zip(*parts, strict=True)
    stored = {name: torch.cat(codes), f"{name}_scale": torch.cat(scale)}
    present = [zero for zero in zeros if zero is not None]
    return stored | ({f"{name}_zero": torch.cat(present)} if present else {})


def _rounding(spec, method, calibration, in_features, name) -> Rounding:
    if method == "gptq" and calibration is not None:
        hessian = prepare_hessian(calibration, in_features, spec.padded(in_features), name)
        if hessian is not None:
            return lambda groups: round_with_hessian(groups, spec, hessian)
    mask = (torch.arange(spec.padded(in_features)) < in_features).float()
    mask = mask.unflatten(0, (spec.num_groups(in_features), -1))
    fit = range_grid if method == "rtn" else fit_grid

    def round_part(groups: torch.Tensor) -> tuple[torch.Tensor, Grid]:
        grid = fit(groups, spec, mask)
        return encode(groups, grid, spec), grid

    return round_part


def _checked(weight, name) -> torch.Tensor:
    finite = torch.isfinite(weight)
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        raise CheckpointError(
            f"{name} has {weight[row, column].item()} in row {row}, column {column}. Weights must be finite numbers: "
            "the checkpoint is damaged or was saved from a diverged training; fetch it again."
        )
    return weight


def _row_parts(weight, spec, part_weights) -> Iterator[torch.Tensor]:
    """Yield rows in parts, [rows, groups, group_size], float32, clamped to what float16 scales hold; padding 0."""
    num_rows, in_features = weight.shape
    padded = spec.padded(in_features)
    rows = max(part_weights // padded, 1)
    limit = largest_weight(spec)
    for first in range(0, num_rows, rows):
        part = weight[first : first + rows].float().clamp(-limit, limit)
        yield F.pad(part, (0, padded - in_features)).unflatten(1, (spec.num_groups(in_features), -1))


def _stored(codes, grid, spec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return packed codes, scale and zero (or None) as they are stored."""
    whole = codes.flatten(1).to(torch.int8).view(torch.uint8)
    zero = None if grid.zero is None else grid.zero.squeeze(-1).half()
    return pack_codes(whole, spec.bits), grid.scale.squeeze(-1).half(), zero
