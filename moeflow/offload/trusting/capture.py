"""Captures what a device is told to do, so that it is told again in one call, without the Python that told it.

The only place that knows CUDA graphs. Not yet measured on a GPU.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Capture(Protocol):
    """Captures kernels and copies on one device."""

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Run once to warm up, which has its effects, and once to record, which has none.

        Args:
            run: launches the work, always over the same tensors.

        Returns:
            What `run` returned as it was recorded, tensors that every replay writes anew; and what replays it.

        Raises:
            RuntimeError: `run` waits for the device, or does something else that cannot be captured.
        """


class CudaCapture:
    """A CUDA graph of what is launched, on a side stream.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        with torch.cuda.device(self._device):
            outside, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(outside)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.stream(side):
                    run()  # compiles kernels and lets libraries make their workspaces
                    # Of threads that read and copy meanwhile nothing is captured, and nothing refused.
                    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                        made = run()
            finally:
                outside.wait_stream(side)
        return made, graph.replay
