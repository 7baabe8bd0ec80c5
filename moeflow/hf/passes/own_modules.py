"""Modules of a captured step that stay the model's Python: attention over what no instruction knows.

In the graph each is one node. In a step it is called with the sequence's own cache.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from moeflow.hf import experts_interface
from moeflow.hf.passes.attention import own_implementation

_LIBRARY = torch.library.Library("moeflow", "FRAGMENT")
_LIBRARY.define("own(Tensor[] tensors, int like, int number) -> Tensor")
_CACHES = ("cache", "past_key_values", "cache_params")


@torch.library.register_fake("moeflow::own")
def _(tensors: list[torch.Tensor], like: int, number: int) -> torch.Tensor:
    return torch.empty_like(tensors[like], memory_format=torch.contiguous_format)


class Given(NamedTuple):
    """Stands for an argument of a module that each step has its own of.

    Args:
        what: "tensor" (of the graph), "cache", "mask" (of a window and a chunk) or "result" (of an earlier module).
        first: number of the tensor, the window, or the number of the module.
        second: the chunk, or the place in what the module returned.
    """

    what: str
    first: int = 0
    second: int = 0


class OwnCall(NamedTuple):
    """A module's call in a step.

    Args:
        path: of the module in the model.
        layer: of the cache.
        args: with `Given` in the places of what a step has its own of.
        kwargs: likewise.
    """

    path: str
    layer: int
    args: tuple
    kwargs: dict[str, Any]


def attention_modules(model: PreTrainedModel, layers: set[int]) -> dict[str, torch.nn.Module]:
    """Return the outermost modules, by path, that use these layers of a cache and hold no experts."""
    holders = [path for path, _ in experts_interface.experts_modules(model)]
    found: dict[str, torch.nn.Module] = {}
    for path, module in model.named_modules():
        is_layer = path.rpartition(".")[2].isdigit() or any(holder.startswith(path + ".") for holder in holders)
        if getattr(module, "layer_idx", None) not in layers or is_layer:
            continue
        is_inside = any(path.startswith(outer + ".") for outer in found)
        if not is_inside and any(name in inspect.signature(module.forward).parameters for name in _CACHES):
            found[path] = module
    return found


class OwnModules:
    """The calls of modules that a graph has as nodes.

    Args:
        modules: by path.

    Attributes:
        calls: in their order, once captured.
    """

    def __init__(self, modules: dict[str, torch.nn.Module]) -> None:
        self.calls: list[OwnCall] = []
        self.modules = modules
        self._shapes: dict[str, list[bool] | None] = {}  # whether each of what a module returns is a tensor
        self._results: dict[int, tuple[torch.Tensor, Given]] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Let a real pass show what the modules return."""

        def watch(path: str, module: torch.nn.Module) -> Callable:
            own = module.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                made = own(*args, **kwargs)
                is_one = isinstance(made, torch.Tensor)
                self._shapes[path] = None if is_one else [isinstance(one, torch.Tensor) for one in made]
                return made

            return forward

        with self._replaced(watch):
            yield

    @contextmanager
    def handed(self) -> Iterator[None]:
        """Let each module be a node of the graph under way."""
        self.calls.clear()

        def hand(path: str, module: torch.nn.Module) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                return self._node(path, module, args, kwargs)

            return forward

        with self._replaced(hand):
            yield

    @contextmanager
    def _replaced(self, by: Callable[[str, torch.nn.Module], Callable]) -> Iterator[None]:
        before = {path: vars(module).get("forward") for path, module in self.modules.items()}
        for path, module in self.modules.items():
            module.forward = by(path, module)
        try:
            yield
        finally:
            for path, module in self.modules.items():
                del module.forward
                if before[path] is not None:
                    vars(module)["forward"] = before[path]

    def _node(self, path: str, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        tensors: list[torch.Tensor] = []

        def given(one: Any) -> Any:
            if isinstance(one, Cache):
                return Given("cache")
            if not isinstance(one, torch.Tensor):
                return one
            if id(one) in self._results:
                return self._results[id(one)][1]
            if hasattr(one, "rule"):
                return Given("mask", *one.rule)
            tensors.append(one)
            return Given("tensor", len(tensors) - 1)

        number = len(self.calls)
        call = OwnCall(path, int(module.layer_idx), *tree_map(given, (args, kwargs)))  # type: ignore[arg-type]
        self.calls.append(call)
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        like = next(place for place, one in enumerate(tensors) if one is hidden)
        out = torch.ops.moeflow.own(tensors, like, number)
        shape = self._shapes[path]
        if shape is None:
            return out
        made: list[Any] = [out]
        for place, is_tensor in enumerate(shape[1:], start=1):
            stand_in = torch.empty(0, device="cpu") if is_tensor else None
            if stand_in is not None:
                self._results[id(stand_in)] = stand_in, Given("result", number, place)
            made.append(stand_in)
        return tuple(made)


def call_module(
    module: torch.nn.Module,
    call: OwnCall,
    tensors: list[torch.Tensor],
    cache: Cache,
    first: int,
    results: dict[int, Any],
) -> torch.Tensor:
    """Call a module in a step.

    Args:
        module: of the call.
        call: how.
        tensors: of the graph.
        cache: of the sequence; its layer gets the new position.
        first: the first position of the cache that is not padding.
        results: what earlier modules of the step returned, by their numbers.

    Returns:
        What the module returns, or the first of it.
    """
    layer: Any = cache.layers[call.layer]

    def given(one: Any) -> Any:
        if not isinstance(one, Given):
            return one
        if one.what == "tensor":
            return tensors[one.first]
        if one.what == "result":
            return results[one.first][one.second]
        return cache if one.what == "cache" else _mask(module, layer, one.first, one.second, first, tensors[0].dtype)

    args, kwargs = tree_map(given, (call.args, call.kwargs), is_leaf=lambda one: isinstance(one, Given))
    made = module(*args, **kwargs)
    results[len(results)] = made
    return made if isinstance(made, torch.Tensor) else made[0]


def _mask(module: torch.nn.Module, layer: Any, window: int, chunk: int, first: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask of one new position: [1, 1, 1, positions], booleans, or summands for eager attention."""
    num_positions, begin = layer.get_mask_sizes(1)
    now = begin + num_positions - 1
    if window:
        first = max(first, now - window + 1)
    if chunk:
        first = max(first, now // chunk * chunk)
    seen = (torch.arange(begin, now + 1) >= first).reshape(1, 1, 1, -1)
    if own_implementation(module.config) != "eager":
        return seen
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def remembered(layer: Any) -> Callable[[], None]:
    """Return what brings a cache's layer back to what it is now; for layers that replace their tensors or grow."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: one.clone() if isinstance(one, torch.Tensor) else one for name, one in value.items()}
        return copy.copy(value) if isinstance(value, list) else value

    before = {name: kept(value) for name, value in vars(layer).items()}

    def bring_back() -> None:
        vars(layer).clear()
        vars(layer).update(before)

    return bring_back
