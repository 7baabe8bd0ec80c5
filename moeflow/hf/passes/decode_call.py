"""Calls of a model that ask for one new token a sequence after a growing cache, and the output that it returns."""

import dataclasses
import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from moeflow.hf.passes.growing_cache import GrowingCache

_CACHE_NAMES = ("cache", "past_key_values")  # the newer name first
_ANSWERED = {"input_ids", "position_ids", "attention_mask", "use_cache", "logits_to_keep", "return_dict", *_CACHE_NAMES}
_NEVER = ("output_attentions", "output_hidden_states", "output_router_logits")


class DecodeCall(NamedTuple):
    """A call for the next token of each of some sequences.

    Args:
        input_ids: [rows, 1].
        positions: [rows], of the tokens, in the sequences without their padding where the caller says so.
        firsts: [rows], the first position of the cache that is not padding.
        cache: the positions before them.
        attention_mask: as given.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    firsts: torch.Tensor
    cache: GrowingCache
    attention_mask: torch.Tensor | None


def decode_call(model: PreTrainedModel, kwargs: dict[str, Any]) -> DecodeCall | None:
    """Read the keyword arguments of a model's forward; None where they ask for anything else.

    Args:
        model: that is called.
        kwargs: as given.
    """
    if not may_decode():
        return None
    ids = kwargs.get("input_ids")
    cache = next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)
    if type(cache) is not GrowingCache or ids is None or ids.dim() != 2 or ids.shape[1] != 1 or not cache.length:
        return None
    if any(kwargs[name] is not None for name in kwargs.keys() - _ANSWERED) or kwargs.get("return_dict") is False:
        return None
    if kwargs.get("use_cache") is False or any(getattr(model.config, name, False) for name in _NEVER):
        return None
    length, num_rows = cache.length, len(ids)
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    firsts = torch.zeros(num_rows, dtype=torch.int64)
    if mask is not None:
        if mask.shape != (num_rows, length + 1):
            return None
        seen = mask != 0
        firsts = length + 1 - seen.sum(1)
        if not bool((seen == (torch.arange(length + 1) >= firsts[:, None])).all()):
            return None
    told = _positions(positions, num_rows, length)
    return None if told is None else DecodeCall(ids, told, firsts, cache, mask)


def _positions(positions: torch.Tensor | None, num_rows: int, length: int) -> torch.Tensor | None:
    """Return the positions [rows] of one token a row, which may be told once for each of three dimensions.

    The first of four is that of the text alone, and models use it for masks. None where dimensions are unlike.
    """
    if positions is None:
        return torch.full((num_rows,), length)
    if positions.dim() == 3:
        told = positions[1:] if len(positions) == 4 else positions
        if not len(told) or not bool((told == told[0]).all()):
            return None
        positions = told[0]
    if positions.dim() > 2 or positions.numel() not in (1, num_rows):
        return None
    return positions.reshape(-1).expand(num_rows)


def may_decode() -> bool:
    """Whether nothing in this thread asks torch for more than values: no gradients, autocast or compilation."""
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


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
        """Return an output of logits [rows, 1, V] and the cache."""
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
