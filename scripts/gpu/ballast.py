"""A card with less memory than it has: a tensor takes the rest."""

from typing import Any


class Ballast:
    """Memory of a card that is taken away for a block.

    Args:
        device: the card; nothing is taken on the CPU.
        left_bytes: that stay free.
    """

    def __init__(self, device: str, left_bytes: int) -> None:
        self._device, self._left = device, left_bytes
        self.free_bytes: int | None = None  # as the driver then says
        self.num_bytes = 0  # taken

    def __enter__(self) -> "Ballast":
        import torch

        self._tensor: Any = None
        if self._device != "cpu":
            free, _ = torch.cuda.mem_get_info(self._device)
            self.num_bytes = max(free - self._left, 0)
            self._tensor = torch.empty(self.num_bytes, dtype=torch.uint8, device=self._device)
            self.free_bytes = torch.cuda.mem_get_info(self._device)[0]
        return self

    def __exit__(self, *exc_info: object) -> None:
        import torch

        self._tensor = None
        if self._device != "cpu":
            torch.cuda.empty_cache()
