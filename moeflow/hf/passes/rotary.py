"""Rotary embeddings whose scaling depends on the length of a call, in passes that hold several sequences.

Dynamic NTK and LongRoPE take their scaling from the longest position of a call, and dynamic NTK keeps it for the next
call. Here each sequence of a pass gets the scaling that `generate` would give it alone, from its own length.
"""

import copy
import inspect
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from moeflow.errors import UnsupportedModelError
from moeflow.hf.version import parts_of_transformers

with parts_of_transformers():
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

_MOST_POSITIONS = 1 << 24  # of a model that names no context; float32 counts no further
_SHORTEST = 2  # the position compared is 1


class Span(NamedTuple):
    """Tokens of one sequence in a pass.

    Args:
        num_new: new tokens.
        length: positions that the sequence would have after this call of `generate`: a prompt in pieces counts whole.
    """

    num_new: int
    length: int


_spans: ContextVar[list[Span] | None] = ContextVar("_spans", default=None)  # of the packed pass under way


class Scaling(NamedTuple):
    """How the scaling of one rotary embedding depends on the length.

    Args:
        boundary: the longest length with the scaling of short ones.
        constant: whether all longer ones have one scaling; else each length has its own.
    """

    boundary: int
    constant: bool

    def of(self, length: int) -> int:
        """Return a number that is the same for lengths of the same scaling, and grows with the length."""
        return 0 if length <= self.boundary else self.boundary + 1 if self.constant else length


class SequenceRotary:
    """Stands in for one rotary embedding's forward.

    In a packed pass each sequence gets its own scaling, and the module's state stays as it is. Any other call is the
    module's own.

    Args:
        module: the rotary embedding.
        longest: most positions that a sequence can have.
    """

    def __init__(self, module: torch.nn.Module, longest: int) -> None:
        self._module = module
        self._replaced = module.__dict__.get("forward")  # another library's, which stands in as well
        self._longest = max(_SHORTEST, longest)
        self._parameters = _signature(module)
        self.scalings: dict[Hashable, Scaling] = {}  # by the arguments beside tensors: a model may have several

    @property
    def depends_on_length(self) -> bool:
        """Whether any scaling changes within the positions that a sequence can have."""
        return any(scaling.boundary < self._longest for scaling in self.scalings.values())

    def install(self) -> None:
        """Take the place of the module's forward."""
        self._module.forward = self.forward

    def remove(self) -> None:
        """Give the module its own forward back."""
        if self._replaced is not None:
            self._module.forward = self._replaced
        elif "forward" in self._module.__dict__:
            del self._module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute cosines and sines as the module does, each sequence of a packed pass as if it were alone."""
        spans = _spans.get()
        if spans is None:
            return self._call_module(*args, **kwargs)
        call = self._parameters.bind(*args, **kwargs)
        positions = call.arguments["position_ids"]
        if positions.shape[-1] != sum(span.num_new for span in spans):
            return self._call_module(*args, **kwargs)  # not of the pass's tokens
        use = tuple(value for value in call.arguments.values() if not isinstance(value, torch.Tensor))
        if use not in self.scalings:
            self.scalings[use] = self._measure(call)
        groups: dict[int, list[int]] = {}
        for place, span in enumerate(spans):
            groups.setdefault(self.scalings[use].of(span.length), []).append(place)
        pieces = positions.split([span.num_new for span in spans], -1)
        twin, order, rows = self._twin(call), [], []
        for scaling in sorted(groups):  # a state grows with the length, as in a call of each alone
            places = groups[scaling]
            last = positions.new_full((*positions.shape[:-1], 1), max(spans[place].length for place in places) - 1)
            found = self._compute(twin, call, torch.cat([*(pieces[place] for place in places), last], -1))
            rows.append([tensor[..., :-1, :] for tensor in found])
            order += places
        tensors = [_in_order(parts, order, spans) for parts in zip(*rows, strict=True)]
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    def _call_module(self, *args: Any, **kwargs: Any) -> Any:
        if self._replaced is not None:
            return self._replaced(*args, **kwargs)
        return type(self._module).forward(self._module, *args, **kwargs)

    def _measure(self, call: inspect.BoundArguments) -> Scaling:
        """Find the lengths at which the scaling changes, from what position 1 becomes in a call of each length."""
        longest = self._scaled(call, self._longest)
        short = self._scaled(call, _SHORTEST)
        if _equal(short, longest):
            return Scaling(self._longest, True)
        low, high = _SHORTEST, self._longest  # the scaling of `low` is that of short ones, that of `high` is not
        while high - low > 1:
            middle = (low + high) // 2
            if _equal(short, self._scaled(call, middle)):
                low = middle
            else:
                high = middle
        return Scaling(low, _equal(self._scaled(call, high), longest))

    def _scaled(self, call: inspect.BoundArguments, length: int) -> list[torch.Tensor]:
        """Return what position 1 becomes in a call of this length, in float32."""
        positions = call.arguments["position_ids"]
        both = positions.new_tensor([1, length - 1]).expand(*positions.shape[:-1], 2)
        inputs = {name: _in_float32(value) for name, value in call.arguments.items()}
        exact = inspect.BoundArguments(call.signature, type(call.arguments)(inputs))
        return [tensor[..., :1, :] for tensor in self._compute(self._twin(exact), exact, both)]

    def _twin(self, call: inspect.BoundArguments) -> torch.nn.Module:
        """Copy the module, with its state as it is before any long call."""
        twin = copy.copy(self._module)
        twin.__dict__.pop("forward", None)
        twin._buffers = {name: buffer if buffer is None else buffer.clone() for name, buffer in twin._buffers.items()}
        for length in (self._longest, 1):  # a short call behind a long one resets any state, half changed ones as well
            self._compute(twin, call, torch.full_like(call.arguments["position_ids"][..., :1], length - 1))
        return twin

    def _compute(
        self, twin: torch.nn.Module, call: inspect.BoundArguments, positions: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        arguments = type(call.arguments)({**call.arguments, "position_ids": positions})
        changed = inspect.BoundArguments(call.signature, arguments)
        found = type(twin).forward(twin, *changed.args, **changed.kwargs)
        return (found,) if isinstance(found, torch.Tensor) else tuple(found)


class SequenceRotaries:
    """The rotary embeddings of a model, as packed passes see them.

    Args:
        model: whose rotary embeddings these are. All stand in until `keep_dependent`.
        context: positions that a sequence can have; None for any number.

    Attributes:
        restart: the length at which `generate` computes a sequence's keys and values anew; None for no such length.
    """

    def __init__(self, model: PreTrainedModel, context: int | None) -> None:
        self._model = model
        self._found = [_stand_in(module, context or _MOST_POSITIONS) for module in _rotary_modules(model)]
        self._scalings: list[Scaling] = []
        self.restart: int | None = None

    def keep_dependent(self) -> None:
        """After a first pass: leave those alone whose scaling does not depend on the length."""
        for rotary in self._found:
            if not rotary.depends_on_length:
                rotary.remove()
        self._found = [rotary for rotary in self._found if rotary.depends_on_length]
        self._scalings = [scaling for rotary in self._found for scaling in rotary.scalings.values()]
        boundaries = sorted({scaling.boundary for scaling in self._scalings})
        self.restart = next((end + 1 for end in boundaries if _drops_cache(self._model, end)), None)

    @property
    def depend_on_length(self) -> bool:
        """Whether any scales by the length, once `keep_dependent` was called."""
        return bool(self._found)

    def scaling_of(self, length: int) -> Hashable:
        """Name the scaling of a length: equal where a call of `generate` would scale alike."""
        return tuple(scaling.of(length) for scaling in self._scalings)

    @contextmanager
    def running(self, spans: list[Span]) -> Iterator[None]:
        """Let the passes of this thread meanwhile be packed ones over these spans."""
        token = _spans.set(spans)
        try:
            yield
        finally:
            _spans.reset(token)


def _rotary_modules(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """Yield the modules that make something of positions alone."""
    for module in model.modules():
        bare = not any(True for _ in module.children()) and not any(True for _ in module.parameters())
        if bare and "position_ids" in _signature(module).parameters:
            yield module


def _signature(module: torch.nn.Module) -> inspect.Signature:
    """Return how a module's own forward is called, whatever stands in for it."""
    return inspect.signature(type(module).forward.__get__(module))


def _stand_in(module: torch.nn.Module, longest: int) -> SequenceRotary:
    """Return the module's stand-in, installed: the one that it has, or a new one."""
    found = getattr(module.__dict__.get("forward"), "__self__", None)
    if not isinstance(found, SequenceRotary):
        found = SequenceRotary(module, longest)
        found.install()
    return found


def _in_order(parts: tuple[torch.Tensor, ...], order: list[int], spans: list[Span]) -> torch.Tensor:
    """Join the rows of groups, and bring them from the order of groups into that of the spans."""
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, -2)
    if order == sorted(order):
        return joined
    pieces = joined.split([spans[place].num_new for place in order], -2)
    return torch.cat([piece for _, piece in sorted(zip(order, pieces, strict=True), key=lambda pair: pair[0])], -2)


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(mine, its) for mine, its in zip(one, other, strict=True))


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class _FilledCache(Cache):
    """A key-value cache that says how many positions it has, and has none."""

    def __init__(self, length: int) -> None:
        super().__init__(layers=[])
        self._length = length

    def __len__(self) -> int:
        return 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    @property
    def is_compileable(self) -> bool:
        return False


def _drops_cache(model: PreTrainedModel, length: int) -> bool:
    """Tell whether `generate` drops the keys and values of this many positions when the next token comes.

    Phi-3's kind does so where its scaling changes.

    Raises:
        UnsupportedModelError: the model does not say.
    """
    prepare: Any = model.prepare_inputs_for_generation  # transformers types it as a module
    name = "cache" if "cache" in inspect.signature(prepare).parameters else "past_key_values"
    ids = torch.zeros(1, length + 1, dtype=torch.long)
    given: dict[str, Any] = {name: _FilledCache(length), "next_sequence_length": 1}
    try:
        return prepare(ids, **given).get(name) is None
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not say whether its keys and values stay at {length + 1} tokens, where its "
            f"rotary embedding changes ({type(error).__name__}: {error}). Call model.generate instead."
        ) from error
