"""Linears and norms of the dense parts: moeflow's kernels while tokens are few, the faster of two products beyond."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from moeflow import load_moe
from moeflow.hf.dense_kernels import FewTokensLinear, linear, rms_norm, speed_up_dense
from moeflow.kernels.cpu.ahead import FEW_TOKENS, is_always_ahead
from moeflow.kernels.cpu.library import instruction_set

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_of_few_tokens_is_the_exact_product_rounded_once(dtype, bias):
    torch.manual_seed(0)
    plain = torch.nn.Linear(67, 45, bias=bias).to(dtype)
    fast = torch.nn.Sequential(plain)
    speed_up_dense(fast)
    assert type(plain) is FewTokensLinear
    assert isinstance(plain, torch.nn.Linear)
    for num_tokens in (1, 3, FEW_TOKENS):
        x = torch.randn(num_tokens, 67).to(dtype)
        exact = torch.nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
        with torch.no_grad():
            found = fast(x)
        error = (found.double() - exact).norm() / exact.norm()
        assert error < (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_many_tokens_go_to_torch_only_where_it_is_ahead(dtype):
    """Where torch has no instructions for 16 bits, a token has the same bits in a prompt as alone."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(67, 45).to(dtype)
    of_torch = torch.nn.Linear.forward
    speed_up_dense(torch.nn.Sequential(plain))
    x = torch.randn(FEW_TOKENS + 20, 67).to(dtype)
    with torch.no_grad():
        found, alone = plain(x), torch.cat([plain(token[None]) for token in x])
        expected = alone if is_always_ahead(dtype) else of_torch(plain, x)
    assert torch.equal(found, expected)
    assert dtype != torch.float32 or not is_always_ahead(dtype)


@pytest.mark.skipif(instruction_set() == "portable", reason="portable code is not ahead of torch for many tokens")
def test_who_multiplies_many_tokens_follows_torchs_instructions(monkeypatch):
    for has_them in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has_them=has_them: has_them)
        assert is_always_ahead(torch.bfloat16) != has_them


def test_a_tokens_result_does_not_depend_on_the_tokens_beside_it():
    torch.manual_seed(0)
    weight, x = torch.randn(45, 67), torch.randn(8, 67)
    together = linear(x, weight, None)
    for token in range(8):
        assert torch.equal(linear(x[token : token + 1], weight, None), together[token : token + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_transformers_norm_bit_for_bit(dtype):
    torch.manual_seed(0)
    module = MixtralRMSNorm(200, eps=1e-6).to(dtype)
    module.weight.data = torch.randn(200).to(dtype)
    x = torch.randn(3, 2, 200).to(dtype)
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(rms_norm(x, module.weight, 1e-6), expected)
        holder = torch.nn.Sequential(module)
        speed_up_dense(holder)
        assert isinstance(module, MixtralRMSNorm)
        assert type(module) is not MixtralRMSNorm
        assert torch.equal(holder(x), expected)


class _OneMore(torch.nn.Module):
    """A norm by its looks, and not by what it computes."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)


def test_a_module_that_only_looks_like_a_norm_is_left_alone():
    module = _OneMore()
    speed_up_dense(torch.nn.Sequential(module))
    assert type(module) is _OneMore


def test_gradients_still_flow_through_the_dense_parts(mixtral_folder):
    model = load_moe(mixtral_folder)
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer) is FewTokensLinear
    layer(torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert layer(torch.randn(0, 64)).shape == (0, 64)
    model.moeflow.close()
