"""A layer's routes, and what a predictor wants to see beside them, as one tensor: one copy brings them to the host."""

from typing import NamedTuple

import numpy as np
import torch


class HostRoutes(NamedTuple):
    """What came to the host.

    Args:
        top_k_index: int64 [T, K], expert numbers.
        top_k_weights: float32 [T, K]; None where they were not wanted.
        signal: float32, what the predictor asked for; None where it asked for nothing.
    """

    top_k_index: np.ndarray
    top_k_weights: np.ndarray | None
    signal: np.ndarray | None


class PackedRoutes:
    """Routes on their device.

    Args:
        top_k_index: [T, K].
        top_k_weights: [T, K], if they are wanted too.
        signal: what the predictor wants to see of the layer, of any shape.

    Attributes:
        tensor: int32 [n], all of it; the expert numbers come first.
        shape: T, K.
    """

    def __init__(
        self, top_k_index: torch.Tensor, top_k_weights: torch.Tensor | None = None, signal: torch.Tensor | None = None
    ) -> None:
        floats = [part for part in (top_k_weights, signal) if part is not None]
        parts = [top_k_index.reshape(-1).int(), *(part.float().reshape(-1).view(torch.int32) for part in floats)]
        self.tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        self.shape = top_k_index.shape
        self._shape_of_weights = None if top_k_weights is None else top_k_weights.shape
        self._shape_of_signal = None if signal is None else signal.shape

    def unpack(self, values: np.ndarray) -> HostRoutes:
        """Return what lies in the bytes of `tensor` in host memory, as arrays of their own."""
        flat, count = values.view(np.int32).copy(), self.shape.numel()
        index, floats = flat[:count].astype(np.int64).reshape(self.shape), flat[count:].view(np.float32)
        weights = signal = None
        if self._shape_of_weights is not None:
            weights, floats = floats[:count].reshape(self._shape_of_weights), floats[count:]
        if self._shape_of_signal is not None:
            signal = floats.reshape(self._shape_of_signal)
        return HostRoutes(index, weights, signal)


def routes_on_host(top_k_index: torch.Tensor, top_k_weights: torch.Tensor | None = None) -> HostRoutes:
    """Bring a layer's routes to host memory, in one copy and one wait.

    Args:
        top_k_index: [T, K].
        top_k_weights: [T, K], if they are wanted too.
    """
    if top_k_index.device.type == "cpu":
        weights = None if top_k_weights is None else top_k_weights.detach().float().numpy()
        return HostRoutes(top_k_index.numpy(), weights, None)
    packed = PackedRoutes(top_k_index, top_k_weights)
    return packed.unpack(packed.tensor.cpu().numpy())
