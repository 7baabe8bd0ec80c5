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

    def capture_pieces(self, run: Callable[[Callable[[], None]], Any]) -> tuple[Any, list[Callable[[], None]]]:
        """Run as `capture` does, and record pieces that are replayed one after the other, with other work between.

        Args:
            run: launches the work, always over the same tensors; what it is given ends a piece and begins the next.

        Returns:
            What `run` returned as it was recorded; and what replays each piece, in their order. Between them lies what
            earlier pieces made: no piece may be left out.

        Raises:
            RuntimeError: as for `capture`.
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

    def capture_pieces(self, run: Callable[[Callable[[], None]], Any]) -> tuple[Any, list[Callable[[], None]]]:
        graphs: list[torch.cuda.CUDAGraph] = []
        with torch.cuda.device(self._device):
            outside, side, pool = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.graph_pool_handle()

            def begin() -> None:  # not torch.cuda.graph, which waits for the device each time
                graphs.append(torch.cuda.CUDAGraph())
                graphs[-1].capture_begin(pool=pool, capture_error_mode="thread_local")

            def cut() -> None:
                graphs[-1].capture_end()
                begin()

            side.wait_stream(outside)
            try:
                with torch.cuda.stream(side):
                    run(lambda: None)
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()  # graphs have memory of their own
                    try:
                        begin()
                        made = run(cut)
                    finally:
                        if torch.cuda.is_current_stream_capturing():  # not where an error struck as a piece ended
                            graphs[-1].capture_end()
            finally:
                outside.wait_stream(side)
        return made, [graph.replay for graph in graphs]
