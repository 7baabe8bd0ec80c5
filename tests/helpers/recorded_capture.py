"""A stand-in for CUDA graphs on CPU tensors: records operations with their tensors, and runs them again into those.

As on a card: a replay runs no Python of the model, numbers that were read while it was captured stay as they were, and
what waits for the device is refused. Pieces share what they made, and are recorded without a break.
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
        self.pieces = [[]]

    def cut(self):
        self.pieces.append([])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in _WAITING_OPS:
            raise RefusedError(f"operation not permitted when stream is capturing: {name}")
        made = func(*args, **kwargs)
        self.pieces[-1].append((func, args, kwargs, made))
        return made


def _tensors(tree):
    return [one for one in tree_flatten(tree)[0] if isinstance(one, torch.Tensor)]


def _made(call):
    """The tensors of a recorded call that are in memory of their own, not in that of its arguments."""
    _, args, kwargs, outputs = call
    taken = {one.untyped_storage().data_ptr() for one in _tensors((args, kwargs))}
    return [one.untyped_storage().data_ptr() not in taken for one in _tensors(outputs)]


class RecordedCapture:
    """Captures on the CPU; counts what it did.

    Attributes:
        num_captured: recordings made, each whole or in pieces.
        num_replayed: runs of any of them, or of any piece.
        held: what replays those that are not given back.
    """

    def __init__(self):
        self.num_captured = self.num_replayed = 0
        self.held = weakref.WeakSet()

    def capture(self, run):
        made, (replay,) = self.capture_pieces(lambda cut: run())
        return made, replay

    def capture_pieces(self, run):
        run(lambda: None)
        with _Refusal(), _Recording() as recording:
            try:
                made = run(recording.cut)
            except RuntimeError as error:  # a card tells of it at the end
                raise RefusedError("operation failed due to a previous error during capture") from error
        self.num_captured += 1
        # A recording on a card computes nothing: what is there before the first replay is garbage.
        for call in (call for piece in recording.pieces for call in piece):
            for one, is_own in zip(_tensors(call[-1]), _made(call), strict=True):
                if is_own:
                    one.untyped_storage().fill_(0xA5)
        return made, [self._replayer(piece) for piece in recording.pieces]

    def _replayer(self, calls):
        def replay():
            self.num_replayed += 1
            for call in calls:
                func, args, kwargs, outputs = call
                own = _made(call)
                again = func(*args, **kwargs)
                for old, new, is_own in zip(_tensors(outputs), _tensors(again), own, strict=True):
                    if is_own:
                        old.copy_(new)

        self.held.add(replay)
        return replay
