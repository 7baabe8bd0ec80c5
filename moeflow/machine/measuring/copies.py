"""Bytes a second from memory to the GPU, from pinned and from pageable memory.

Knows CUDA through torch. Knows nothing of experts.
"""

import torch

from moeflow.machine.measuring.timing import median_seconds

_BYTES = 64 << 20


def copies(seconds: float) -> dict[str, float]:
    """Measure copies to the first GPU that this process sees; empty where torch sees none."""
    if not torch.cuda.is_available():
        return {}
    there = torch.empty(_BYTES, dtype=torch.uint8, device="cuda")
    rates = {}
    for name, is_pinned in (("pinned", True), ("pageable", False)):
        here = torch.ones(_BYTES, dtype=torch.uint8, pin_memory=is_pinned)

        def copy(here: torch.Tensor = here, is_pinned: bool = is_pinned) -> None:
            there.copy_(here, non_blocking=is_pinned)
            torch.cuda.synchronize()

        rates[name] = _BYTES / median_seconds(copy, seconds / 2)
    return rates
