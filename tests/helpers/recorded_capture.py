"""A stand-in for CUDA graphs on CPU tensors: records operations with their tensors, and runs them again into those.

As on a card: a replay runs no Python of the model, numbers that were read while it was captured stay as they were, and
what waits for the device is refused.
"""

import weakref

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_WAITS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"}
_WAITING_OPS = {"_local_scalar_dense", "nonzero", "equal", "lift_fresh"}  # the last brings a number from the host


class RefusedError(RuntimeError):
    """What a capture on a card would refuse."""


class _Refusal(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in _WAITS:
            raise RefusedError(f"operation not permitted when stream is capturing: {func.__name__}")
        return func(*args, **(kwargs or {}))


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in _WAITING_OPS:
            raise RefusedError(f"operation not permitted when stream is capturing: {name}")
        made = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, made))
        return made


def _tensors(tree):
    return [one for one in tree_flatten(tree)[0] if isinstance(one, torch.Tensor)]


class RecordedCapture:
    """Captures on the CPU; counts what it did.

    Attributes:
        num_captured: recordings made.
        num_replayed: runs of any of them.
        held: what replays those that are not given back.
    """

    def __init__(self):
        self.num_captured = self.num_replayed = 0
        self.held = weakref.WeakSet()

    def capture(self, run):
        run()
        with _Refusal(), _Recording() as recording:
            try:
                made = run()
            except RuntimeError as error:  # a card tells of it at the end
                raise RefusedError("operation failed due to a previous error during capture") from error
        self.num_captured += 1
        calls = recording.calls
        # A recording on a card computes nothing: what is there before the first replay is garbage.
        for _, args, kwargs, outputs in calls:
            taken = {one.untyped_storage().data_ptr() for one in _tensors((args, kwargs))}
            for one in _tensors(outputs):
                if one.untyped_storage().data_ptr() not in taken:
                    one.untyped_storage().fill_(0xA5)

        def replay():
            self.num_replayed += 1
            for func, args, kwargs, outputs in calls:
                taken = {one.untyped_storage().data_ptr() for one in _tensors((args, kwargs))}
                again = func(*args, **kwargs)
                for old, new in zip(_tensors(outputs), _tensors(again), strict=True):
                    if old.untyped_storage().data_ptr() not in taken:
                        old.copy_(new)

        self.held.add(replay)
        return made, replay
