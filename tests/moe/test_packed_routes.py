"""Routes come to the host whole: expert numbers and weights, in one copy where they lie on a device."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moeflow.moe.packed_routes import PackedRoutes, routes_on_host

INDEX = torch.tensor([[3, 0, 128], [5, -1, 2]])
WEIGHTS = torch.tensor([[0.5, 0.25, -0.125], [float("inf"), 0.0, 1e-30]], dtype=torch.bfloat16)


def equal(array, tensor):
    return torch.equal(torch.from_numpy(array), tensor)


def test_routes_in_host_memory_stay_where_they_are():
    routes = routes_on_host(INDEX, WEIGHTS)
    assert routes.top_k_index.ctypes.data == INDEX.data_ptr()
    assert equal(routes.top_k_weights, WEIGHTS.float())
    assert routes.signal is None
    assert routes_on_host(INDEX).top_k_weights is None


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["no weights", "weights"])
@pytest.mark.parametrize("signal", [None, torch.randn(2, 1, 5), torch.randn(2, 7).bfloat16()], ids=["-", "3", "2"])
def test_what_is_packed_is_unpacked_with_all_its_bits_into_memory_of_its_own(weights, signal):
    packed = PackedRoutes(INDEX, weights, signal)
    values = packed.tensor.clone().numpy().view(np.uint8)
    routes = packed.unpack(values)
    values[:] = 0
    assert packed.shape == (2, 3)
    assert equal(routes.top_k_index, INDEX)
    for found, given in ((routes.top_k_weights, weights), (routes.signal, signal)):
        assert (found is None) == (given is None)
        assert found is None or equal(found, given.float())


class Device(torch.Tensor):
    """Values in host memory that say that they lie on a GPU; `.cpu()` counts its calls."""

    downloads = 0
    device = property(lambda self: torch.device("cuda", 0))

    def cpu(self):
        Device.downloads += 1
        return self.as_subclass(torch.Tensor)


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "local_scalar" not in str(func)
        return func(*args, **(kwargs or {}))


def test_routes_on_a_device_come_in_one_copy_with_all_their_bits():
    with Nothing():
        routes = routes_on_host(INDEX.as_subclass(Device), WEIGHTS.as_subclass(Device))
    assert Device.downloads == 1
    assert equal(routes.top_k_index, INDEX)
    assert equal(routes.top_k_weights, WEIGHTS.float())
    only = routes_on_host(INDEX.as_subclass(Device))
    assert (Device.downloads, only.top_k_weights) == (2, None)
    assert equal(only.top_k_index, INDEX)
