"""Activations are recognised by what they compute, whatever module computes them."""

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from moeflow.kernels.activations import Activation, recognise

GATED = [
    *(Activation(kind, "concatenated") for kind in ("silu", "gelu", "gelu_tanh", "relu", "relu2")),
    *(Activation(kind, "interleaved") for kind in ("silu", "gelu", "gelu_tanh", "relu", "relu2")),
    Activation("silu", "concatenated", alpha=1.702),
    Activation("swiglu_oai", "interleaved", alpha=1.702, limit=7.0),
    Activation("swiglu_oai", "concatenated", alpha=1.5, limit=6.0),
    Activation("silu_limited", "concatenated", limit=10.0),
    Activation("silu_capped", "concatenated", limit=7.0),
]  # fmt: skip


@pytest.mark.parametrize("activation", GATED, ids=str)
def test_every_gate_is_recognised_from_its_values(activation):
    assert recognise(activation.apply, True) == activation


@pytest.mark.parametrize(
    ("name", "kind", "alpha"),
    [
        ("silu", "silu", 1.0),
        ("quick_gelu", "silu", 1.702),
        ("gelu", "gelu", 1.0),
        ("gelu_new", "gelu_tanh", 1.0),
        ("gelu_pytorch_tanh", "gelu_tanh", 1.0),
        ("relu", "relu", 1.0),
        ("relu2", "relu2", 1.0),
    ],
)
def test_functions_of_transformers_are_recognised(name, kind, alpha):
    assert recognise(ACT2FN[name], False) == Activation(kind, "none", alpha)

    def gated(x):
        gate, up = x.chunk(2, dim=-1)
        return ACT2FN[name](gate) * up

    assert recognise(gated, True) == Activation(kind, "concatenated", alpha)


@pytest.mark.parametrize("name", ["tanh", "mish", "hardswish", "leaky_relu", "gelu_10"])
def test_other_functions_are_not_taken_for_known_ones(name):
    assert recognise(ACT2FN[name], False) is None


def test_gpt_oss_and_its_concatenated_cousin_are_recognised():
    def oai(gate, up):
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    for layout in ("interleaved", "concatenated"):
        found = recognise(lambda x, layout=layout: oai(*halves(x, layout)), True)
        assert found == Activation("swiglu_oai", layout, 1.702, 7.0)


def test_softcapped_gates_are_not_taken_for_known_ones():
    assert recognise(lambda x: F.silu(x.chunk(2, -1)[0]) * 5 * torch.tanh(x.chunk(2, -1)[1] / 5), True) is None


def halves(x, layout):
    return x.chunk(2, dim=-1) if layout == "concatenated" else (x[..., ::2], x[..., 1::2])
