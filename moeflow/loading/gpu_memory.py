"""The memory of one GPU: its counters, and what is said where it has too little for a model's dense weights.

Not yet run on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from moeflow.errors import BudgetError
from moeflow.loading.device_plan import usable_bytes


class GpuMemory:
    """The counters of one GPU's memory: of the driver, and of torch's allocator. No other GPU is touched.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free_bytes(self) -> int:
        """Return the bytes that this process can take; what an earlier model left in the allocator is free."""
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(self.device)
            reserved, allocated = torch.cuda.memory_reserved(self.device), torch.cuda.memory_allocated(self.device)
        return usable_bytes(free, reserved, allocated)

    def peak_of(self, run: Callable[[], object]) -> int:
        """Run twice, and return the most bytes that tensors took the second time, beyond those that were there before.

        What the first time leaves, such as the workspaces of libraries and the driver's own memory for kernels, is no
        longer free, and so not counted. Raises what `run` raises.
        """
        with torch.cuda.device(self.device):
            try:
                run()
                torch.cuda.synchronize(self.device)
                before = torch.cuda.memory_allocated(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
                run()
                torch.cuda.synchronize(self.device)
                return torch.cuda.max_memory_allocated(self.device) - before
            finally:
                torch.cuda.empty_cache()


@contextmanager
def dense_weights_on(device: torch.device) -> Iterator[None]:
    """Load dense weights onto a device.

    Raises:
        BudgetError: they do not fit; what was loaded of them is free again.
    """
    told = None
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = str(error).partition("\n")[0]
    if told is not None:  # behind the handler, where nothing holds the weights any more
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise BudgetError(
            f"{device} has too little memory for the dense weights of this model, of which none can be left out "
            f"({told}). Free memory on it, choose another GPU, or load with device='cpu'. `moeflow info MODEL` says "
            "what they take."
        )
