"""Calls of a model that ask for one new token after a growing cache, and the output that it returns for them."""

import dataclasses
import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from moeflow.hf.passes.growing_cache import GrowingCache

_CACHE_NAMES = ("cache", "past_key_values")  # the newer name first
_ANSWERED = {"input_ids", "position_ids", "attention_mask", "use_cache", "logits_to_keep", "return_dict", *_CACHE_NAMES}
_NEVER = ("output_attentions", "output_hidden_states", "output_router_logits")


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


def decode_call(model: PreTrainedModel, kwargs: dict[str, Any]) -> DecodeCall | None:
    """Read the keyword arguments of a model's forward; None where they ask for anything else.

    Args:
        model: that is called.
        kwargs: as given.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    ids = kwargs.get("input_ids")
    cache = next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)
    if type(cache) is not GrowingCache or ids is None or ids.shape != (1, 1) or not cache.get_seq_length():
        return None
    if any(kwargs[name] is not None for name in kwargs.keys() - _ANSWERED) or kwargs.get("return_dict") is False:
        return None
    if kwargs.get("use_cache") is False or any(getattr(model.config, name, False) for name in _NEVER):
        return None
    length, first = cache.get_seq_length(), 0
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None:
        if mask.shape != (1, length + 1):
            return None
        first = length + 1 - int(mask.sum())
        if first and (first < 0 or int(mask.argmax()) != first):
            return None
    position = length if positions is None else _position(positions)
    return None if position is None else DecodeCall(ids, position, first, cache)


def _position(positions: torch.Tensor) -> int | None:
    """Return the position of one token, which may be told once for each of three dimensions; None for unlike ones.

    The first of four is that of the text alone, and models use it for masks.
    """
    if positions.shape[-2:] != (1, 1) or positions.dim() > 3:
        return None
    told = positions.flatten().tolist()
    told = told[1:] if len(told) == 4 else told
    return told[0] if told == told[:1] * len(told) else None


def refusal(kwargs: dict[str, Any]) -> str | None:
    """Say why a call for one new token of each sequence is none for a program; None for other calls."""
    ids, cache = kwargs.get("input_ids"), kwargs.get("cache", kwargs.get("past_key_values"))
    try:
        if not isinstance(cache, Cache) or not cache.get_seq_length():
            return None
    except ValueError:  # a cache without positions
        return None
    if ids is None or ids.shape[-1] != 1:
        return "its last call was for several new tokens, or for none by number"
    if type(cache) is not GrowingCache:
        return f"it is called with a {type(cache).__name__}, which is not moeflow's cache"
    return f"its last call was for {len(ids)} sequences, or asked for more than logits and a cache"


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
