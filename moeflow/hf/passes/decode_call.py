"""Calls of a model that ask for one new token after a growing cache, and the output that it returns for them."""

import dataclasses
import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._device import DeviceContext
from transformers import PreTrainedModel

from moeflow.hf.passes.growing_cache import GrowingCache

_CACHE_NAMES = ("cache", "past_key_values")  # the newer name first
_ANSWERED = {"input_ids", "position_ids", "attention_mask", "use_cache", "logits_to_keep", "return_dict", *_CACHE_NAMES}
_NEVER = ("output_attentions", "output_hidden_states", "output_router_logits")
_WHOLE = (torch.int64, torch.int32)


class DecodeCall(NamedTuple):
    """A call for the next token of one sequence.

    Args:
        input_ids: [1, 1].
        position: of the token, in the sequence without its padding where the caller says so.
        first: the first position of the cache that is not padding.
        cache: the positions before it.
    """

    input_ids: torch.Tensor
    position: int
    first: int
    cache: GrowingCache


def has_growing_cache(kwargs: dict[str, Any]) -> bool:
    """Whether a model's forward is given a cache that a program can go on with."""
    return any(type(kwargs.get(name)) is GrowingCache for name in _CACHE_NAMES)


def decode_call(model: PreTrainedModel, kwargs: dict[str, Any]) -> DecodeCall | None:
    """Read the keyword arguments of a model's forward; None where they ask for anything else.

    Args:
        model: that is called.
        kwargs: as given.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or _is_watched():
        return None
    ids: Any = kwargs.get("input_ids")
    cache = next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)
    if type(cache) is not GrowingCache or not _is_one_number(ids) or ids.dim() != 2 or not cache.get_seq_length():
        return None
    if any(kwargs[name] is not None for name in kwargs.keys() - _ANSWERED):
        return None
    keep, config = kwargs.get("logits_to_keep"), model.config
    parts = [config, *(getattr(config, name, None) for name in type(config).sub_configs)]
    if kwargs.get("use_cache") is False or any(getattr(part, name, False) for part in parts for name in _NEVER):
        return None
    if kwargs.get("return_dict") is False or not config.return_dict or not (keep is None or _is_count(keep)):
        return None
    length, first = cache.get_seq_length(), 0
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.shape != (1, length + 1):
            return None
        seen = mask if mask.dtype is torch.bool else mask != 0
        first = length + 1 - int(seen.sum())
        if first and (first > length or bool(seen[0, :first].any())):
            return None
    if positions is not None and not _is_one_number(positions):
        return None
    return DecodeCall(ids, length if positions is None else int(positions), first, cache)


def _is_watched() -> bool:
    """Whether torch's operations are compiled, traced or handed to a mode of the caller's."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return True
    modes = [torch._C._get_function_stack_at(place) for place in range(torch._C._len_torch_function_stack())]
    return any(type(mode) is not DeviceContext for mode in modes)


def _is_one_number(given: Any) -> bool:
    return isinstance(given, torch.Tensor) and given.numel() == 1 and given.dtype in _WHOLE and given.is_cpu


def _is_count(given: Any) -> bool:
    return isinstance(given, int) and given >= 0


class OutputMaker:
    """Makes what a model's forward returns, once it has been seen."""

    def __init__(self) -> None:
        self._kind: Callable[..., Any] | None = None
        self._cache_name = ""

    @property
    def knows(self) -> bool:
        """Whether an output was seen that has logits and a cache."""
        return self._kind is not None

    def learn(self, output: Any) -> None:
        """Look at an output of the model's own forward."""
        if self._kind is None and dataclasses.is_dataclass(output) and not isinstance(output, type):
            names = {one.name for one in dataclasses.fields(output)}
            found = next((name for name in _CACHE_NAMES if name in names), None)
            if "logits" in names and found is not None:
                self._kind, self._cache_name = type(output), found

    def make(self, logits: torch.Tensor, cache: GrowingCache) -> Any:
        """Return an output of logits [1, 1, V] and the cache."""
        assert self._kind is not None, "no output was seen"
        return self._kind(logits=logits, **{self._cache_name: cache})


def run_calls_by(model: PreTrainedModel, run: Callable[[dict[str, Any]], Any], learn: Callable[[Any], None]) -> None:
    """Offer each call of a model to `run` first, and let `generate` use growing caches.

    Args:
        model: whose forward is wrapped.
        run: takes the keyword arguments; returns the output, or None where the model must run the call itself.
        learn: is shown the outputs of the model's own.
    """
    behind = weakref.ref(model)
    changed: Any = model
    kind: Any = type(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        made = None if args else run(kwargs)
        if made is None:
            made = kind.forward(behind(), *args, **kwargs)
            learn(made)
        return made

    def prepare_cache(*args: Any, **kwargs: Any) -> Any:
        settings = [given for given in (*args, *kwargs.values()) if isinstance(given, dict)]  # the model's arguments
        given = [{name for name in _CACHE_NAMES if one.get(name) is not None} for one in settings]
        result = kind._prepare_cache_for_generation(behind(), *args, **kwargs)
        for one, before in zip(settings, given, strict=True):
            for name in set(_CACHE_NAMES) - before:
                growing = GrowingCache.in_place_of(one.get(name))
                if growing is not None:
                    one[name] = growing
        return result

    replaced: Any = forward
    replaced.__signature__ = inspect.signature(model.forward)
    changed.forward = forward
    changed._prepare_cache_for_generation = prepare_cache
