"""The host tier: pinned slots between disk and device, with a cache of their own.

Knows how host memory is registered with CUDA, piece by piece. Registration is not yet run on a GPU.
"""

import contextlib
import logging
from typing import Protocol

import torch

from moeflow.formatting import format_bytes
from moeflow.offload.slot_pool import SlotPool
from moeflow.policy.cache import ExpertCache

_PIECE_BYTES = 256 << 20  # registered at once
_PORTABLE = 1  # pinned for every GPU's context
_log = logging.getLogger(__name__)


class Registrar(Protocol):
    """Pins host memory."""

    def register(self, address: int, num_bytes: int) -> str | None:
        """Pin memory; return None, or why it was refused. No error stays behind."""

    def unregister(self, address: int) -> None:
        """Free memory that was pinned at this address."""


class CudaRegistrar:
    """Pins host memory for a GPU, exactly as many bytes as are asked for (torch's pin_memory rounds them up).

    Args:
        device: the GPU; no other is touched.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def register(self, address: int, num_bytes: int) -> str | None:
        """Pin memory; return None, or the CUDA error, which is cleared."""
        with torch.cuda.device(self._device):
            code = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, _PORTABLE))
            if code == 0:
                return None
            # The error stays the thread's last one, which the next launch would raise: let this launch take it.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=self._device)
            return f"CUDA error {code}"

    def unregister(self, address: int) -> None:
        """Free memory that was pinned at this address; of a card that was lost nothing is left to free."""
        with contextlib.suppress(RuntimeError), torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(address)


class PinnedPool(SlotPool):
    """Slots of pinned host memory; fewer than were asked for where the system refuses to pin them.

    No copy reads two registered pieces, which hold whole slots.

    Args:
        num_slots: how many are wanted.
        record_bytes: the largest record.
        registrar: pins memory.
        least_slots: so many there are, pinned or not.

    Raises:
        BudgetError: the memory could not be allocated.
    """

    def __init__(self, num_slots: int, record_bytes: int, registrar: Registrar, *, least_slots: int) -> None:
        super().__init__(num_slots, record_bytes, torch.device("cpu"))
        self.num_pinned = 0
        self._registrar = registrar
        self._pieces: list[int] = []  # where each registered piece begins
        try:
            refusal = self._pin()
        except BaseException:
            self.close()
            raise
        if self.num_pinned == num_slots:
            return
        self.shrink(max(self.num_pinned, least_slots))
        _log.warning(
            "the system pins %s of the %s of host memory wanted (%s): the model goes on with %s there, and copies to "
            "the GPU may be slower. Raise the limit (ulimit -l; WSL pins half of the RAM), or give a smaller "
            "host_memory.",
            format_bytes(self.num_pinned * self.stride),
            format_bytes(num_slots * self.stride),
            refusal,
            format_bytes(self.num_bytes),
        )

    def close(self) -> None:
        """Free the pinned pieces, then the memory; a second call goes on where one was cut off."""
        while self._pieces:
            self._registrar.unregister(self._pieces[-1])
            self._pieces.pop()
        super().close()

    def _pin(self) -> str | None:
        """Register slots from the first on, in pieces that are halved where one is refused; return the last refusal."""
        at_once, refusal = max(1, _PIECE_BYTES // self.stride), None
        while at_once and self.num_pinned < self.num_slots:
            count = min(at_once, self.num_slots - self.num_pinned)
            begin = self.address + self.num_pinned * self.stride
            refused = self._registrar.register(begin, count * self.stride)
            if refused is None:
                self._pieces.append(begin)
                self.num_pinned += count
            else:
                refusal, at_once = refused, count // 2
        return refusal


class HostTier:
    """Pinned slots and the cache that fills them.

    Args:
        pool: host memory, pinned where there is a GPU.
        cache: which expert sits in which of its slots.
    """

    def __init__(self, pool: SlotPool, cache: ExpertCache) -> None:
        self.pool = pool
        self.cache = cache
        # The end of the last copy out of each slot: the slot may not be overwritten before it.
        self.last_copy: list[object] = [None] * pool.num_slots
