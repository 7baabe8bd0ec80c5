"""A layer's experts in one call: the bits of its parts, what it asks for, what it refuses."""

import numpy as np
import pytest
import torch

from helpers.cpu_experts import AVAILABLE, Expert, needs_library, use
from moeflow.errors import ConfigError
from moeflow.kernels.cpu import ops as cpu
from moeflow.kernels.cpu.layer import LayerKernel

H, NUM_EXPERTS = 72, 6

pytestmark = needs_library


class Layer:
    """Experts in an arena, in falling order of their numbers."""

    def __init__(self, form, shape=(H, 40)):
        self.experts = [Expert(seed, form, shape) for seed in range(NUM_EXPERTS)]
        num_bytes = self.experts[0].record.num_bytes
        self.arena = torch.zeros(NUM_EXPERTS + 1, -(-num_bytes // 64) * 64, dtype=torch.uint8)
        slots = range(NUM_EXPERTS, 0, -1)
        for expert, slot in zip(self.experts, slots, strict=True):
            start = expert.address - expert.memory.data_ptr()
            self.arena[slot, :num_bytes] = expert.memory[start : start + num_bytes]
        self.addresses = np.array([self.arena[slot].data_ptr() for slot in slots])
        self.kernels = [expert.kernel for expert in self.experts]
        self.kernel = LayerKernel(self.kernels, 0)

    def run(self, x, index, weights):
        return self.kernel.run(x, index, weights, self.addresses)

    def run_in_parts(self, x, index, weights):
        """Run every expert in a call of its own, in falling order, then sum."""
        outputs = torch.zeros(index.numel(), x.shape[1])
        for number in range(NUM_EXPERTS - 1, -1, -1):
            places = (index.flatten() == number).nonzero().flatten().tolist()
            tokens = [place // index.shape[1] for place in places]
            address = int(self.addresses[number])
            cpu.run_experts(x, [self.kernels[number]], [address], [0, len(tokens)], tokens, places, outputs)
        return cpu.combine(outputs, weights, x.dtype)


def routes(num_tokens, top_k, dtype, *, most=NUM_EXPERTS):
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, H, generator=generator).to(dtype)
    index = torch.rand(num_tokens, most, generator=generator).argsort(-1)[:, :top_k]
    return x, index, torch.rand(num_tokens, top_k, generator=generator)


@pytest.fixture(params=AVAILABLE or ["none"])
def forced(request):
    """Each instruction set in turn."""
    use(request.param)
    yield request.param
    use("")


@pytest.mark.parametrize("form", ["float32", "int4-g32"])
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_has_the_bits_of_its_parts(forced, form, num_tokens, dtype):
    layer, (x, index, weights) = Layer(form), routes(num_tokens, 3, dtype)
    found = layer.run(x, index, weights.to(dtype))
    assert torch.equal(found.hidden_states, layer.run_in_parts(x, index, weights.to(dtype)))


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_a_number_beyond_the_experts_means_none_and_one_twice_counts_twice(num_tokens):
    layer, (x, index, weights) = Layer("float32"), routes(num_tokens, 4, torch.float32, most=NUM_EXPERTS + 3)
    index[:, 1] = index[:, 0]
    assert (index >= NUM_EXPERTS).any()
    found = layer.run(x, index, weights)
    assert torch.equal(found.hidden_states, layer.run_in_parts(x, index, weights))
    none = layer.run(x, torch.full_like(index, NUM_EXPERTS), weights)
    assert none.experts == []
    assert torch.equal(none.hidden_states, torch.zeros_like(x))


def test_experts_asked_for_are_those_of_the_routes_in_the_order_of_a_fetch():
    layer = Layer("float32")
    x, _, weights = routes(2, 3, torch.float32)
    assert layer.run(x[:1], torch.tensor([[4, 0, 4]]), weights[:1]).experts == [4, 0]
    assert layer.run(x, torch.tensor([[4, 0, 9], [4, 2, 0]]), weights).experts == [0, 2, 4]


def test_a_layer_that_lacks_an_expert_does_not_run():
    layer, (x, index, weights) = Layer("float32"), routes(9, 2, torch.float32)
    for number in range(NUM_EXPERTS):
        address, layer.addresses[number] = layer.addresses[number], 0
        assert (layer.run(x, index, weights) is None) == bool((index == number).any())
        layer.addresses[number] = address
    index[3, 1] = -1
    assert layer.run(x, index, weights) is None


def test_tensors_in_any_order_of_memory_and_routers_in_any_dtype_are_taken():
    layer, (x, index, weights) = Layer("float32"), routes(9, 2, torch.float32)
    expected = layer.run(x, index, weights).hidden_states
    apart = [tensor.t().contiguous().t() for tensor in (x, index, weights)]
    assert not any(tensor.is_contiguous() for tensor in apart)
    for found in (layer.run(*apart), layer.run(x, index.int(), weights.double())):
        assert torch.equal(found.hidden_states, expected)


def test_memory_beyond_what_is_kept_gives_the_same_bits_twice():
    layer, (x, index, weights) = Layer("float32"), routes(20000, 3, torch.float32)
    assert x.numel() * 3 > 1 << 22  # floats that a thread keeps
    first = layer.run(x, index, weights).hidden_states
    assert torch.equal(layer.run(x, index, weights).hidden_states, first)


@pytest.mark.parametrize("change", ["x", "index", "weights", "addresses", "fewer", "features", "meta"])
def test_what_does_not_fit_is_refused(change):
    layer, (x, index, weights) = Layer("float32"), routes(9, 2, torch.float32)
    if change == "x":
        x = x.double()
    elif change == "index":
        index = index[:8]
    elif change == "weights":
        weights = weights[:, :1]
    elif change == "addresses":
        layer.addresses = layer.addresses.astype(np.float64)
    elif change == "fewer":
        layer.addresses = layer.addresses[1:]
    elif change == "features":
        x = x[:, :-1]
    else:
        index = index.to("meta")
    with pytest.raises(ConfigError, match="Allowed"):
        layer.run(x, index, weights)
