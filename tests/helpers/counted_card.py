"""A card's counters of memory over tensors of the CPU: those that are made inside a block lie on the card."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.two_cards import TwoCards


class CountedCard(TorchDispatchMode):
    """Puts itself in the place of the counters of the second of two cards.

    Args:
        monkeypatch: pytest's.
        num_bytes: of the card.
        other_bytes: of weights and of other programs.
    """

    def __init__(self, monkeypatch, num_bytes, other_bytes=0):
        super().__init__()
        self.device = torch.device("cuda", 1)
        self.num_bytes, self.other_bytes = num_bytes, other_bytes
        self.is_fragmented = False  # the allocator gives nothing back to the driver
        self.kept = self.peak = 0  # bytes in the allocator, and of tensors at most
        self.cards = TwoCards(monkeypatch)
        self._made, self._outside = {}, {}  # by the address of a storage, which a weak reference keeps from others
        for name in ("empty_cache", "mem_get_info", "memory_reserved", "memory_allocated", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset_peak)

    def memory_allocated(self, device):
        self._made = {number: found for number, found in self._made.items() if not found[0].expired()}
        return sum(size for _, size in self._made.values())

    def memory_reserved(self, device):
        return max(self.kept, self.memory_allocated(device))

    def max_memory_allocated(self, device):
        return self.peak

    def reset_peak(self, device):
        self.peak = self.memory_allocated(device)

    def mem_get_info(self, device):
        return self.num_bytes - self.other_bytes - self.memory_reserved(device), self.num_bytes

    def empty_cache(self):
        assert self.cards.current == 1, "another card's context"
        if not self.is_fragmented:
            self.kept = self.memory_allocated(self.device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outside = {storage._cdata: StorageWeakRef(storage) for storage in _storages((args, kwargs or {}))}
        self._outside.update({number: ref for number, ref in outside.items() if number not in self._made})
        found = func(*args, **(kwargs or {}))
        for storage in _storages(found):
            if storage._cdata not in self._outside:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        allocated = self.memory_allocated(self.device)
        if allocated > self.num_bytes - self.other_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much.\nmore lines")
        self.peak, self.kept = max(self.peak, allocated), max(self.kept, allocated)
        return found


def _storages(values):
    return [tensor.untyped_storage() for tensor in tree_leaves(values) if isinstance(tensor, torch.Tensor)]
