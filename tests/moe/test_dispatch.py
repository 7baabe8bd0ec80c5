"""Routes come to the host whole: expert numbers and weights, in one copy where they lie on a device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moeflow.moe.dispatch import routes_on_host

INDEX = torch.tensor([[3, 0, 128], [5, -1, 2]])
WEIGHTS = torch.tensor([[0.5, 0.25, -0.125], [float("inf"), 0.0, 1e-30]], dtype=torch.bfloat16)


def test_routes_in_host_memory_stay_where_they_are():
    index, weights = routes_on_host(INDEX, WEIGHTS)
    assert index is INDEX
    assert weights is WEIGHTS
    assert routes_on_host(INDEX) == (INDEX, None)


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
    Device.downloads = 0
    with Nothing():
        index, weights = routes_on_host(INDEX.as_subclass(Device), WEIGHTS.as_subclass(Device))
    assert Device.downloads == 1
    assert torch.equal(index, INDEX)
    assert torch.equal(weights, WEIGHTS.float())
    only, none = routes_on_host(INDEX.as_subclass(Device))
    assert (Device.downloads, none) == (2, None)
    assert torch.equal(only, INDEX)
