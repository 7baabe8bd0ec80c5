"""The machine a plan is for: GPUs, their memory and speed, and the bandwidth between each two.

Knows numbers. Knows nothing of files or of what runs on the GPUs.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from moeflow.errors import PlacementError


@dataclass(frozen=True)
class Gpu:
    """One device.

    Args:
        memory_bytes: its memory for experts; math.inf where that is unknown.
        flops_per_s: rate of expert matrix products, multiply and add counted as two.
        memory_bytes_per_s: rate of reading weights.
        node: number of the machine it stands in.
    """

    memory_bytes: float
    flops_per_s: float
    memory_bytes_per_s: float
    node: int = 0


@dataclass(frozen=True)
class Topology:
    """G GPUs and the links between them.

    Args:
        name: its name in tables.
        gpus: [G].
        bandwidth_bytes_per_s: [G, G], from row to column; the diagonal is ignored.

    Raises:
        PlacementError: no GPU, a GPU without memory or speed, or two GPUs without a link.
    """

    name: str
    gpus: tuple[Gpu, ...]
    bandwidth_bytes_per_s: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "gpus", tuple(self.gpus))
        if not self.gpus:
            raise PlacementError(f"topology {self.name} has no GPU. Give one or more.")
        for number, gpu in enumerate(self.gpus):
            for name in ("memory_bytes", "flops_per_s", "memory_bytes_per_s"):
                value = getattr(gpu, name)
                if not value > 0 or (value == math.inf and name != "memory_bytes"):
                    raise PlacementError(
                        f"topology {self.name}: GPU {number} has {name} {value}. It must be above 0: correct it, or "
                        "leave the GPU out."
                    )
        try:
            bandwidth = np.array(self.bandwidth_bytes_per_s, np.float64)
        except (TypeError, ValueError):
            raise PlacementError(f"topology {self.name}: bandwidth is not a square of numbers.") from None
        if bandwidth.shape != (self.num_gpus, self.num_gpus):
            raise PlacementError(
                f"topology {self.name}: bandwidth has shape {list(bandwidth.shape)} for {self.num_gpus} GPUs. Give "
                f"[{self.num_gpus}, {self.num_gpus}]."
            )
        np.fill_diagonal(bandwidth, np.inf)
        if self.num_gpus > 1:
            bad = np.argwhere(~(bandwidth > 0))
            if len(bad):
                source, target = bad[0]
                raise PlacementError(
                    f"topology {self.name} is not connected: GPU {source} to GPU {target} has bandwidth "
                    f"{bandwidth[source, target]}. Tokens go between every two GPUs: give what the way between these "
                    "two carries, through host memory or the network if need be."
                )
        object.__setattr__(self, "bandwidth_bytes_per_s", bandwidth)

    @property
    def num_gpus(self) -> int:
        return len(self.gpus)

    @property
    def nodes(self) -> tuple[int, ...]:
        """[G], each GPU's node."""
        return tuple(gpu.node for gpu in self.gpus)

    def without_memory_limits(self) -> "Topology":
        """Return the same machine with unlimited memory, for experts of unknown size."""
        return replace(self, gpus=tuple(replace(gpu, memory_bytes=math.inf) for gpu in self.gpus))


# Rates of expert products and links in practice, rounded; a topology file is more exact (docs/placement.md).
_H100 = (80 * 10**9, 400e12, 3.0e12)
_RTX_4090 = (24 * 10**9, 120e12, 0.9e12)
_NVLINK, _INFINIBAND, _PCIE = 360e9, 40e9, 20e9
PRESETS = ("nvlink", "pcie", "two-nodes")


def preset(name: str, num_gpus: int) -> Topology:
    """Return a usual machine: "nvlink" (one node of H100), "pcie" (RTX 4090 through the host), "two-nodes" (of H100).

    Raises:
        PlacementError: an unknown name, no GPU, or an odd number for two nodes.
    """
    if name not in PRESETS:
        raise PlacementError(f"topology {name!r} is neither a file nor known. Known: {', '.join(PRESETS)}.")
    if num_gpus < 1:
        raise PlacementError(f"{num_gpus} GPUs were asked for. Give 1 or more.")
    if name == "two-nodes" and num_gpus % 2:
        raise PlacementError(f"two-nodes halves the GPUs, and {num_gpus} is odd. Give an even number, or a file.")
    card = _RTX_4090 if name == "pcie" else _H100
    node = [g * 2 // num_gpus if name == "two-nodes" else 0 for g in range(num_gpus)]
    within = _PCIE if name == "pcie" else _NVLINK
    bandwidth = np.where(np.equal.outer(node, node), within, _INFINIBAND)
    return Topology(name, tuple(Gpu(*card, number) for number in node), bandwidth)
