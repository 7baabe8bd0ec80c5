"""The activation between an expert's first and second matrix, in registers.

The formula is that of `moeflow.kernels.activations`. Knows nothing of matrices.
"""

import triton
import triton.language as tl
from moeflow.kernels.activations import ACTIVATIONS, Activation

LINEAR = {
    "ACT": "linear",
    "GATE": "none",
    "ALPHA": 1.0,
    "GATE_LIMIT": 0.0,
    "ACTIVATED_LIMIT": 0.0,
    "UP_LIMIT": 0.0,
    "UP_OFFSET": 0.0,
}


def constants(activation: Activation) -> dict:
    """Return the activation's compile-time constants; a limit of 0 bounds nothing."""
    terms = ACTIVATIONS[activation.kind]
    return {
        "ACT": terms.act,
        "GATE": activation.gate,
        "ALPHA": float(activation.alpha),
        "GATE_LIMIT": float(activation.limit) if terms.limits_gate else 0.0,
        "ACTIVATED_LIMIT": float(activation.limit) if terms.limits_activated else 0.0,
        "UP_LIMIT": float(activation.limit) if terms.limits_up else 0.0,
        "UP_OFFSET": float(terms.up_offset),
    }


@triton.jit
def activate(
    gate,
    up,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    ALPHA: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    ACTIVATED_LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
):
    """Apply the gate, or without one the activation.

    Args:
        gate: [...] float32, the activation's argument.
        up: the same, the factor of its result; ignored without a gate.

    Returns:
        [...] float32.
    """
    if GATE == "none":
        result = _act(gate, ACT, ALPHA)
    else:
        if GATE_LIMIT > 0:
            gate = tl.where(gate > GATE_LIMIT, GATE_LIMIT, gate)  # NaN stays
        if UP_LIMIT > 0:
            up = tl.where(up > UP_LIMIT, UP_LIMIT, tl.where(up < -UP_LIMIT, -UP_LIMIT, up))
        result = _act(gate, ACT, ALPHA)
        if ACTIVATED_LIMIT > 0:
            result = tl.where(result > ACTIVATED_LIMIT, ACTIVATED_LIMIT, result)
        result = result * (up + UP_OFFSET)
    return result


@triton.jit
def _act(x, ACT: tl.constexpr, ALPHA: tl.constexpr):
    if ACT == "linear":
        result = x
    elif ACT == "silu":
        result = x * tl.sigmoid(ALPHA * x)
    elif ACT == "gelu":
        result = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        result = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "relu":
        result = tl.where(x < 0, 0.0, x)
    else:
        tl.static_assert(ACT == "relu2")
        result = tl.where(x < 0, 0.0, x * x)
    return result


@triton.jit
def rows_of_features(features, N: tl.constexpr, GATE: tl.constexpr):
    """Return the matrix rows of a tile.

    Args:
        features: [R], first + 0 .. R - 1, counted in rows: with a gate two neighbours are one feature.

    Returns:
        [R], rows; N and more where there is no such feature.
    """
    if GATE == "concatenated":
        rows = features // 2 + (features % 2) * (N // 2)
        result = tl.where(features < N, rows, N)
    else:
        result = features
    return result
