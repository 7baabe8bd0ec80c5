"""Keys and values in memory, counted at every allocation."""

import weakref

from torch.utils._python_dispatch import TorchDispatchMode


class Alive(TorchDispatchMode):
    """The most bytes of keys and values that there are at once: of some tensors, and of all that are made.

    With a share of a budget, also the most bytes beyond what it holds at that moment.
    """

    def __init__(self, tensors=(), share=None):
        super().__init__()
        self.now = self.most = self.most_beyond = 0
        self._share = share
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor):
        self.now += tensor.nbytes
        self.most = max(self.most, self.now)
        if self._share is not None:
            self.most_beyond = max(self.most_beyond, self.now - self._share.num_bytes)
        weakref.finalize(tensor, self.leave, tensor.nbytes)

    def leave(self, num_bytes):
        self.now -= num_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("empty", "new_empty", "clone") and made.ndim == 4:
            self.add(made)
        return made
