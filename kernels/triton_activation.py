"""The step between an expert's first and second matrix, in registers.

Kinds are those of `moeflow.kernels.activations`. Knows nothing of matrices.
"""

import triton
import triton.language as tl


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, GATE: tl.constexpr):
    """Apply the gate, or without one the activation.

    Args:
        gate: [...] float32, what the activation is applied to.
        up: the same, what it is multiplied with; not looked at without a gate.

    Returns:
        [...] float32.
    """
    if GATE == "none":
        result = _curve(gate, ACTIVATION)
    elif ACTIVATION == "swiglu_oai":
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        result = (up + 1) * gate * tl.sigmoid(ALPHA * gate)
    else:
        result = _curve(gate, ACTIVATION) * up
    return result


@triton.jit
def _curve(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "linear":
        result = x
    elif ACTIVATION == "silu":
        result = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        result = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        result = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        result = tl.where(x < 0, 0.0, x)
    else:
        tl.static_assert(ACTIVATION == "relu2")
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
