"""Trusted steps that are captured once for each memory of keys and values, and then replayed.

A captured step belongs to one generation: what is changed in a model between two generations is never missed. Knows
tensors and the names of a call's arguments. Knows nothing of transformers.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from moeflow.offload.trusting.capture import Capture
from moeflow.offload.trusting.device_table import DeviceTable
from moeflow.offload.trusting.trusted_step import TrustedStep

_MOST = 8  # captured steps of one cache; its memory grows by doubling
_PLAIN = (bool, int, float, str, type(None))


class StepMemory(Protocol):
    """The cache of a generation, between the begin of a step and its end."""

    @property
    def memory(self) -> list[torch.Tensor]:
        """Every tensor that a step reads or writes beside weights and experts."""

    @property
    def capacity(self) -> int:
        """Positions that there is memory for."""


class CannotCaptureError(Exception):
    """A step that takes or returns what a captured one cannot. It never leaves the runtime."""


class _Captured(NamedTuple):
    """One captured step: its tensors stay where they are."""

    key: tuple  # names and shapes of its arguments
    fixed: list[torch.Tensor]
    inputs: dict[str, torch.Tensor]
    make: Callable[[object], Any]
    step: TrustedStep
    replay: Callable[[], None]


class StepGraphs:
    """The captured steps of one model.

    Args:
        capture: of its device.
        table: of its experts' slots.

    Attributes:
        reason: why the last decode step was not replayed; None where it was.
        num_captured: steps captured so far.
        num_replayed: steps replayed so far.
    """

    def __init__(self, capture: Capture, table: DeviceTable) -> None:
        self.reason: str | None = "no decode step has run"
        self.num_captured = 0
        self.num_replayed = 0
        self._capture: Capture | None = capture
        self._table = table
        self._refusal: str | None = None  # for good
        self._of: weakref.WeakKeyDictionary[StepMemory, list[_Captured]] = weakref.WeakKeyDictionary()

    def close(self) -> None:
        """Give the captured steps back; none is captured from now on."""
        self._capture, self._refusal = None, "the model was closed"
        self._of.clear()

    def as_dict(self) -> dict[str, Any]:
        """Return how many steps were captured and replayed, and why the last was not."""
        return {"captured": self.num_captured, "replayed": self.num_replayed, "not_replayed": self.reason}

    def run(
        self,
        begin: Callable[..., TrustedStep],
        cache: StepMemory,
        forward: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a trusted step by its captured one, which is captured first if there is none, or by itself.

        Args:
            begin: begins the step anew, by a captured one if it is given, and returns it.
            cache: that the step goes on with.
            forward: runs the step.
            args: its arguments.
            kwargs: its keyword arguments.

        Returns:
            What `forward` returns.
        """
        try:
            if self._refusal is not None:
                raise CannotCaptureError(self._refusal)
            found = self._find(begin, cache, forward, args, kwargs)
        except CannotCaptureError as error:
            self.reason = str(error)
            begin()
            return forward(*args, **kwargs)
        begin(found.step)
        _write(found.inputs, kwargs)
        found.replay()
        self.reason, self.num_replayed = None, self.num_replayed + 1
        return found.make(cache)

    def _find(
        self, begin: Callable[..., TrustedStep], cache: StepMemory, forward: Callable, args: tuple, kwargs: dict
    ) -> _Captured:
        key, captured = _key(cache, args, kwargs), self._of.setdefault(cache, [])
        fixed = [self._table.arena, *cache.memory]
        for one in captured:
            if one.key == key and all(mine is now for mine, now in zip(one.fixed, fixed, strict=True)):
                return one
        if len(captured) == _MOST:
            raise CannotCaptureError(f"a generation changed its calls or its memory more than {_MOST} times")
        inputs = {name: _standing(name, one, cache) for name, one in kwargs.items() if isinstance(one, torch.Tensor)}
        _write(inputs, kwargs)
        steps: list[TrustedStep] = []

        def run() -> Any:
            steps.append(begin())
            made = forward(**{**kwargs, **inputs})
            steps[-1].pack()
            return made

        assert self._capture is not None
        try:
            made, replay = self._capture.capture(run)
        except RuntimeError as error:
            first = error.__context__ if isinstance(error.__context__, RuntimeError) else error  # the end fails as well
            self._refusal = f"the model's step cannot be captured: {str(first).splitlines()[0]}"
            raise CannotCaptureError(self._refusal) from error
        found = _Captured(key, fixed, inputs, _maker(made, cache), steps[-1], replay)
        captured.append(found)
        self.num_captured += 1
        return found


def _key(cache: StepMemory, args: tuple, kwargs: dict[str, Any]) -> tuple:
    if args:
        raise CannotCaptureError("the model is called with arguments without names")
    key: list[tuple] = [(torch.is_inference_mode_enabled(),)]
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor):
            shape = value.shape[:1] if _is_mask(name, value) else value.shape
            key.append((name, shape, value.dtype, value.device))
        elif isinstance(value, _PLAIN):
            key.append((name, type(value), value))
        elif value is cache:
            key.append((name,))
        else:
            raise CannotCaptureError(f"the model is called with {name} of type {type(value).__name__}")
    return tuple(key)


def _is_mask(name: str, value: torch.Tensor) -> bool:
    """Whether it is the mask [S, positions so far], which grows with every step."""
    return name == "attention_mask" and value.dim() == 2


def _standing(name: str, value: torch.Tensor, cache: StepMemory) -> torch.Tensor:
    shape = (len(value), cache.capacity) if _is_mask(name, value) else value.shape
    return torch.zeros(shape, dtype=value.dtype, device=value.device)


def _write(inputs: dict[str, torch.Tensor], kwargs: dict[str, Any]) -> None:
    for name, standing in inputs.items():
        value = kwargs[name]
        (standing[:, : value.shape[1]] if _is_mask(name, value) else standing).copy_(value)


def _maker(made: Any, cache: StepMemory) -> Callable[[object], Any]:
    """Return what makes a step's output from that of a captured one and from the cache, of which it holds nothing."""
    kind, fields = type(made), dict(made) if isinstance(made, dict) else {}
    tensors = {name: None if value is cache else value for name, value in fields.items()}
    if not fields or not all(value is None or isinstance(value, torch.Tensor) for value in tensors.values()):
        raise CannotCaptureError(f"the model returns more than tensors and a cache ({kind.__name__})")

    def make(cache: object) -> Any:
        return kind(**{name: cache if value is None else value.clone() for name, value in tensors.items()})

    return make
