"""Decode steps that are captured once for each memory of keys and values, and then replayed.

A captured step belongs to one generation: what is changed in a model between two generations is never missed. Knows
tensors and the names of a call's arguments. Knows nothing of transformers.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from moeflow.offload.trusting.capture import Capture

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


class Recorded(NamedTuple):
    """What was recorded of a step.

    Args:
        made: what the model returned, tensors that every replay writes anew.
        begin: begins a replay.
        replay: runs the step.
    """

    made: Any
    begin: Callable[[], Any]
    replay: Callable[[], None]


class _Captured(NamedTuple):
    """One captured step: its tensors stay where they are. It holds nothing of the cache."""

    inputs: dict[str, torch.Tensor]
    make: Callable[[object], Any]
    begin: Callable[[], Any]
    replay: Callable[[], None]


class _Known(NamedTuple):
    """A call of the model that was seen before, by the names and shapes of its arguments and its memory."""

    key: tuple
    fixed: list[torch.Tensor]
    found: _Captured | str  # or why it cannot be captured


class CapturedSteps(ABC):
    """The captured steps of one model.

    Args:
        capture: of its device.

    Attributes:
        reason: why the last decode step was not replayed; None where it was.
        num_captured: steps captured so far.
        num_replayed: steps replayed so far.
    """

    def __init__(self, capture: Capture) -> None:
        self.reason: str | None = "no decode step has run"
        self.num_captured = 0
        self.num_replayed = 0
        self._capture: Capture | None = capture
        self._refusal: str | None = None  # for good
        self._of: weakref.WeakKeyDictionary[StepMemory, list[_Known]] = weakref.WeakKeyDictionary()

    def close(self) -> None:
        """Give the captured steps back; none is captured from now on."""
        self._capture, self._refusal = None, "the model was closed"
        self._of.clear()

    def as_dict(self) -> dict[str, Any]:
        """Return how many steps were captured and replayed, and why the last was not."""
        return {"captured": self.num_captured, "replayed": self.num_replayed, "not_replayed": self.reason}

    def run(
        self,
        begin: Callable[..., Any],
        cache: StepMemory,
        forward: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        *,
        kind: object = None,
    ) -> Any:
        """Run a step by its captured one, which is captured first if there is none, or by itself.

        Args:
            begin: begins the step anew, where what ran before was none.
            cache: that the step goes on with.
            forward: runs the step.
            args: its arguments.
            kwargs: its keyword arguments.
            kind: what else two steps must have in common.

        Returns:
            What `forward` returns.
        """
        try:
            if self._refusal is not None:
                raise CannotCaptureError(self._refusal)
            found = self._find(begin, cache, forward, kwargs, (kind, *_key(cache, args, kwargs)))
        except CannotCaptureError as error:
            self.reason = str(error)
            begin()
            return forward(*args, **kwargs)
        found.begin()
        _write(found.inputs, kwargs)
        found.replay()
        self.reason, self.num_replayed = None, self.num_replayed + 1
        return found.make(cache)

    @abstractmethod
    def _record(self, capture: Capture, begin: Callable[..., Any], run: Callable[[], Any]) -> Recorded:
        """Capture what `run` launches.

        Raises:
            CannotCaptureError: steps of this cache, called so, cannot be captured.
            RuntimeError: the model's steps cannot be captured.
        """

    def _fixed(self, cache: StepMemory) -> list[torch.Tensor]:
        """Return the tensors that must be where they were when the step was captured."""
        return cache.memory

    def _find(
        self, begin: Callable[..., Any], cache: StepMemory, forward: Callable, kwargs: dict[str, Any], key: tuple
    ) -> _Captured:
        known, fixed = self._of.setdefault(cache, []), self._fixed(cache)
        for one in known:
            if one.key == key and all(mine is now for mine, now in zip(one.fixed, fixed, strict=True)):
                if isinstance(one.found, str):
                    raise CannotCaptureError(one.found)
                return one.found
        if len(known) == _MOST:
            raise CannotCaptureError(f"a generation changed its calls or its memory more than {_MOST} times")
        inputs = {name: _standing(name, one, cache) for name, one in kwargs.items() if isinstance(one, torch.Tensor)}
        _write(inputs, kwargs)
        assert self._capture is not None
        try:
            recorded = self._record(self._capture, begin, lambda: forward(**{**kwargs, **inputs}))
            found = _Captured(inputs, _maker(recorded.made, cache), recorded.begin, recorded.replay)
        except CannotCaptureError as error:
            known.append(_Known(key, fixed, str(error)))
            raise
        except RuntimeError as error:
            first = error.__context__ if isinstance(error.__context__, RuntimeError) else error  # the end fails as well
            self._refusal = f"the model's step cannot be captured: {str(first).splitlines()[0]}"
            raise CannotCaptureError(self._refusal) from error
        known.append(_Known(key, fixed, found))
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
