"""GPTQ: codes chosen column by column, and each column's rounding error compensated in the columns still to come.

Uses the Hessian of the layer's inputs, X^T X. The grid is fitted beforehand, to weights that count by the size of their
inputs.

Knows groups of weights and a Hessian. Knows nothing of packing, files or models.

Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers".
"""

from operator import itemgetter
from typing import NamedTuple

import torch

from moeflow.errors import ConfigError
from moeflow.kernels.quantization.formats import WeightFormat
from moeflow.kernels.quantization.hqq import fit_grid
from moeflow.kernels.quantization.rounding import Grid, decode, encode

# Shares of the diagonal's mean that are added to it: always, and times K / tokens, since few inputs predict badly.
_DAMPING = 0.02
_FEW_DAMPING = 0.1
_BLOCK_COLUMNS = 128
_MAX_ASYMMETRY = 1e-4  # share of the largest entry; float32 sums of products may have it


class Hessian(NamedTuple):
    """The Hessian of a layer's inputs, prepared for rounding.

    Args:
        order: [Kp], columns from the most to the least important.
        factor: [Kp, Kp], float32, upper Cholesky factor of the inverse, in that order.
        importance: [Kp], float32, the diagonal in the order of the weight; 0 in the padding.
    """

    order: torch.Tensor
    factor: torch.Tensor
    importance: torch.Tensor


def prepare_hessian(calibration: torch.Tensor, in_features: int, padded: int, name: str) -> Hessian | None:
    """Return the Hessian of a layer.

    Args:
        calibration: [tokens, K], inputs of the layer, or [K, K], their X^T X.
        in_features: K.
        padded: Kp.
        name: of the weight, for errors.

    Returns:
        None where there are no inputs or all are 0.

    Raises:
        ConfigError: inputs of another size, or not finite.
    """
    if calibration.dim() != 2 or calibration.shape[1] != in_features:
        raise ConfigError(
            f"the calibration of {name} is {list(calibration.shape)}. Allowed: inputs [tokens, {in_features}], or "
            f"their Hessian [{in_features}, {in_features}]."
        )
    if not torch.isfinite(calibration).all():
        raise ConfigError(f"the calibration of {name} has NaN or infinite inputs. Record them again, or leave it out.")
    found = calibration.double()
    known = _is_hessian(found)  # then the number of tokens is unknown: taken as K
    products = found if known else found.T @ found
    mean = products.diagonal().mean() if len(products) else 0
    if not mean > 0:
        return None
    hessian = torch.eye(padded, dtype=torch.float64)  # the padding's columns touch no other
    hessian[:in_features, :in_features] = products / mean
    hessian.diagonal()[:in_features] += _DAMPING + _FEW_DAMPING * (1 if known else in_features / len(found))
    importance = hessian.diagonal().clone()
    importance[in_features:] = 0
    order = importance.argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    return Hessian(order, torch.linalg.cholesky(inverse, upper=True).float(), importance.float())


def round_with_hessian(groups: torch.Tensor, spec: WeightFormat, hessian: Hessian) -> tuple[torch.Tensor, Grid]:
    """Choose grid and codes that keep the layer's output, not its weights.

    Args:
        groups: [N, groups, group_size], float32; padding is 0.
        spec: the format.
        hessian: of the layer.

    Returns:
        codes of the shape of `groups`, as `encode` gives them, and the grid of [N, groups, 1].
    """
    grid = fit_grid(groups, spec, hessian.importance.view(groups.shape[1:]))
    order = hessian.order
    # [Kp, N]: a column of the weight is contiguous
    columns = grid.map(lambda part: part.expand_as(groups).flatten(1).T[order])
    weights = groups.flatten(1).T[order]
    codes = torch.empty_like(weights)
    for first in range(0, len(weights), _BLOCK_COLUMNS):
        last = min(first + _BLOCK_COLUMNS, len(weights))
        errors = torch.empty_like(weights[first:last])
        for column in range(first, last):
            here = columns.map(itemgetter(column))
            codes[column] = encode(weights[column], here, spec)
            error = (weights[column] - decode(codes[column], here, spec)) / hessian.factor[column, column]
            weights[column + 1 : last].addr_(hessian.factor[column, column + 1 : last], error, alpha=-1)
            errors[column - first] = error
        weights[last:].addmm_(hessian.factor[first:last, last:].T, errors, alpha=-1)
    back = torch.empty_like(codes)
    back[order] = codes
    return back.T.reshape(groups.shape), grid


def _is_hessian(calibration) -> bool:
    """Return whether [tokens, K] is X^T X: square, symmetric, nothing negative on the diagonal."""
    if calibration.shape[0] != calibration.shape[1] or (calibration.diagonal() < 0).any():
        return False
    return bool((calibration - calibration.T).abs().max() <= _MAX_ASYMMETRY * calibration.abs().max())
