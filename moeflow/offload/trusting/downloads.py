"""Tensors of the device that come down to host memory, each in one copy that compute does not wait for.

Knows memory and the order of copies. Knows nothing of what the bytes mean. Not yet measured on a GPU.
"""

import numpy as np
import torch

from moeflow.offload.streams import Streams

_LEAST_BYTES = 4096  # of a buffer


class _Buffer:
    """Host memory, and the end of the last copy into it.

    Args:
        num_bytes: its size.
        is_pinned: whether the device copies into it by itself.
    """

    def __init__(self, num_bytes: int, is_pinned: bool) -> None:
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        self.bytes = self.memory.numpy()
        self.copied: object = None


class Download:
    """One tensor on its way. Its memory is used again when nobody holds this object any more."""

    def __init__(self, buffer: _Buffer, num_bytes: int, streams: Streams, free: list[_Buffer]) -> None:
        self._buffer = buffer
        self._num_bytes = num_bytes
        self._streams = streams
        self._free = free

    def wait(self) -> np.ndarray:
        """Block until the tensor is there; return its bytes, uint8 [num_bytes], valid while this object is held."""
        self._streams.synchronize(self._buffer.copied)
        self._buffer.copied = None
        return self._buffer.bytes[: self._num_bytes]

    def __del__(self) -> None:
        self._free.append(self._buffer)


class Downloads:
    """Starts copies down, into buffers that are used again. One thread at a time calls it.

    Args:
        streams: the order between copies and compute.
        is_pinned: whether the tensors lie in a memory of their own, on a GPU.
    """

    def __init__(self, streams: Streams, *, is_pinned: bool) -> None:
        self._streams = streams
        self._is_pinned = is_pinned
        self._free: list[_Buffer] = []

    def start(self, source: torch.Tensor) -> Download:
        """Start the copy of a tensor, behind the caller's compute so far and before what it launches later."""
        flat = source.contiguous().view(-1).view(torch.uint8)
        num_bytes = flat.numel()
        buffer = self._take(num_bytes)
        self._streams.wait(buffer.copied)  # which nobody may have waited for
        download = Download(buffer, num_bytes, self._streams, self._free)
        buffer.copied = self._streams.bring_down(buffer.memory[:num_bytes], flat)
        return download

    def _take(self, num_bytes: int) -> _Buffer:
        for place, buffer in enumerate(self._free):
            if len(buffer.bytes) >= num_bytes:
                return self._free.pop(place)
        return _Buffer(max(_LEAST_BYTES, 1 << (num_bytes - 1).bit_length()), self._is_pinned)
