"""The activation between an expert's two matrices, recognised by its values rather than by its name.

Every activation the kernels know is one formula,

    min(act(min(gate, gate_limit)), activated_limit) * (clamp(up, -up_limit, up_limit) + up_offset)

and `ACTIVATIONS` says which of its terms a kind uses. Knows tensors. Knows nothing of models.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Multiples of a sixteenth, so that sums and products of samples are the same in any order.
_SAMPLES = (
    0.0,
    0.0625,
    -0.0625,
    0.5,
    -0.5,
    1.0,
    -1.0,
    2.5,
    -2.5,
    6.5,
    -6.5,
    7.5,
    -7.5,
    11.0,
    -11.0,
    30.0,
    -30.0,
    900.0,
)
_FAR_VALUE = 1e4  # beyond any limit in use


class Terms(NamedTuple):
    """Which terms of the formula a kind uses.

    Args:
        act: "silu", "gelu", "gelu_tanh", "relu" or "relu2".
        limits_gate: whether `limit` bounds the gate before `act`.
        limits_activated: whether `limit` bounds the result of `act`.
        limits_up: whether `limit` bounds the up half.
        up_offset: added to the up half.
    """

    act: str
    limits_gate: bool = False
    limits_activated: bool = False
    limits_up: bool = False
    up_offset: float = 0.0


ACTIVATIONS = {
    "silu": Terms("silu"),
    "gelu": Terms("gelu"),
    "gelu_tanh": Terms("gelu_tanh"),
    "relu": Terms("relu"),
    "relu2": Terms("relu2"),
    "swiglu_oai": Terms("silu", limits_gate=True, limits_up=True, up_offset=1.0),  # gpt-oss
    "silu_limited": Terms("silu", limits_gate=True, limits_up=True),  # DeepSeek-V4
    "silu_capped": Terms("silu", limits_activated=True, limits_up=True),  # Step 3.7
}


class Activation(NamedTuple):
    """One activation.

    Args:
        kind: a name in `ACTIVATIONS`.
        gate: "none"; or where the gate and the up half of the first matrix's outputs lie: "concatenated" ([gate; up])
            or "interleaved" (gate 0, up 0, gate 1, ...).
        alpha: silu(x) is x * sigmoid(alpha * x).
        limit: bound of the terms that the kind bounds.
    """

    kind: str
    gate: str
    alpha: float = 1.0
    limit: float = math.inf

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activation of the first matrix's outputs: [n, 2I] -> [n, I] with a gate, else [n, I] -> same."""
        terms = ACTIVATIONS[self.kind]
        if self.gate == "none":
            return self._act(terms.act, x)
        gate, up = x.chunk(2, dim=-1) if self.gate == "concatenated" else (x[..., ::2], x[..., 1::2])
        if terms.limits_gate:
            gate = gate.clamp(max=self.limit)
        if terms.limits_up:
            up = up.clamp(-self.limit, self.limit)
        activated = self._act(terms.act, gate)
        if terms.limits_activated:
            activated = activated.clamp(max=self.limit)
        return activated * (up + terms.up_offset)

    def _act(self, act: str, x: torch.Tensor) -> torch.Tensor:
        if act == "silu":
            return x * torch.sigmoid(self.alpha * x)
        if act == "relu2":
            return F.relu(x).square()
        if act == "relu":
            return F.relu(x)
        return F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


@torch.no_grad()
def recognise(apply: Callable[[torch.Tensor], torch.Tensor], has_gate: bool) -> Activation | None:
    """Find the activation that a module's own function computes.

    Args:
        apply: [n, 2I] -> [n, I] with a gate, else [n, I] -> the same.
        has_gate: whether there is a gate.

    Returns:
        The activation that agrees with it to float32 rounding on samples of every range; None where none does.
    """
    if not has_gate:
        sample = torch.tensor([_SAMPLES])
        alphas = _alphas(apply(torch.tensor([[1.0, 0.0]]))[0, 0].item())
        candidates = [Activation(kind, "none") for kind in ("gelu", "gelu_tanh", "relu", "relu2")]
        return _first(candidates + [Activation("silu", "none", alpha) for alpha in alphas], apply, sample)
    pairs = torch.cartesian_prod(torch.tensor(_SAMPLES), torch.tensor(_SAMPLES))
    for gate in ("concatenated", "interleaved"):

        def value(gate_value: float, up_value: float, gate: str = gate) -> float:
            return apply(_laid_out(torch.tensor([[gate_value, up_value]] * 2), gate))[0, 0].item()

        offset = value(1.0, 0.0)
        limit = value(1.0, _FAR_VALUE) / (offset or value(1.0, 1.0) or 1.0) - (1.0 if offset else 0.0)
        limit = math.inf if not 0 < limit < 0.99 * _FAR_VALUE else float(f"{limit:.4g}")
        alphas = _alphas(offset or value(1.0, 1.0))
        candidates = [Activation(kind, gate) for kind in ("silu", "gelu", "gelu_tanh", "relu", "relu2")]
        for kind in ("silu", "swiglu_oai", "silu_limited", "silu_capped"):
            candidates += [Activation(kind, gate, alpha, math.inf if kind == "silu" else limit) for alpha in alphas]
        if found := _first(candidates, apply, _laid_out(pairs, gate)):
            return found
    return None


def _laid_out(pairs, gate) -> torch.Tensor:
    """Return one row of gates and ups as the gate has them: [1, 2I] of [I, 2]."""
    return (pairs.T if gate == "concatenated" else pairs).reshape(1, -1)


def _alphas(activated) -> list[float]:
    """List the possible values of alpha where silu(1) is `activated`."""
    if not 0.5 < activated < 1:
        return [1.0]
    return [1.0, float(f"{math.log(activated / (1 - activated)):.4g}")]


def _first(candidates, apply, sample) -> Activation | None:
    found = apply(sample)
    for candidate in candidates:
        expected = candidate.apply(sample.clone())
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=2e-5, atol=1e-6):
            return candidate
    return None
