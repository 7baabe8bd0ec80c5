"""Calls of a model that a step can answer: new tokens after a growing cache, and the output that it returns."""

import dataclasses
import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._device import DeviceContext
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from moeflow.hf.passes.caches.growing_cache import GrowingCache
from moeflow.hf.passes.step_rows import EXACT_ROWS, SpanRows, StepRows

_CACHE_NAMES = ("cache", "past_key_values")  # the newer name first
_ANSWERED = {"input_ids", "position_ids", "attention_mask", "use_cache", "logits_to_keep", "return_dict", *_CACHE_NAMES}
_NEVER = ("output_attentions", "output_hidden_states", "output_router_logits")
_WHOLE = (torch.int64, torch.int32)


class DecodeCall(NamedTuple):
    """A call with one new token of each of some sequences, or with several of one, as the verifying of a draft has.

    Args:
        input_ids: [sequences, tokens of each].
        positions: [tokens], in the sequences without their padding where the caller says so.
        firsts: [sequences], the first position of the cache that is not padding.
        cache: the positions before them.
        attention_mask: as given.
        num_logits: the last tokens whose logits are wanted; 0 for all.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    firsts: torch.Tensor
    cache: GrowingCache
    attention_mask: torch.Tensor | None
    num_logits: int

    @property
    def rows(self) -> StepRows:
        """The call as a step: a row for each token."""
        num_new = self.input_ids.shape[1]
        kept = self.cache if num_new == 1 else SpanRows(self.cache, num_new)
        return StepRows(kept, self.input_ids.reshape(-1, 1), self.positions, self.firsts.repeat(num_new))


def has_growing_cache(kwargs: dict[str, Any]) -> bool:
    """Whether a model's forward is given a cache that a program can go on with."""
    return any(type(kwargs.get(name)) is GrowingCache for name in _CACHE_NAMES)


def decode_call(model: PreTrainedModel, kwargs: dict[str, Any]) -> DecodeCall | None:
    """Read the keyword arguments of a model's forward; None where they ask for anything else.

    Args:
        model: that is called.
        kwargs: as given.
    """
    if not may_decode():
        return None
    ids: Any = kwargs.get("input_ids")
    cache = next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)
    if type(cache) is not GrowingCache or not _is_whole(ids) or ids.dim() != 2 or not cache.length:
        return None
    num_rows, num_new = ids.shape
    if num_new != 1 and not (num_rows == 1 and 0 < num_new <= EXACT_ROWS):
        return None
    # `generate` gives vision models an empty dict of encoded images in its first step.
    if any(kwargs[name] is not None and kwargs[name] != {} for name in kwargs.keys() - _ANSWERED):
        return None
    keep, config = kwargs.get("logits_to_keep"), model.config
    parts = [config, *(getattr(config, name, None) for name in type(config).sub_configs)]
    if kwargs.get("use_cache") is False or any(getattr(part, name, False) for part in parts for name in _NEVER):
        return None
    if kwargs.get("return_dict") is False or not config.return_dict or not (keep is None or _is_count(keep)):
        return None
    length, total = cache.length, cache.length + num_new
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    firsts = torch.zeros(num_rows, dtype=torch.int64)
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.shape != (num_rows, total):
            return None
        seen = mask != 0
        firsts = total - seen.sum(1)
        if not bool((seen == (torch.arange(total) >= firsts[:, None])).all()) or bool((firsts > length).any()):
            return None
    if positions is not None and not _is_whole(positions):
        return None
    told = _positions(positions, num_rows, num_new, length)
    return None if told is None else DecodeCall(ids, told, firsts, cache, mask, keep or 0)


def _positions(positions: torch.Tensor | None, num_rows: int, num_new: int, length: int) -> torch.Tensor | None:
    """Return the positions [tokens], which may be told once for each of three dimensions.

    The first of four is that of the text alone, and models use it for masks. None where dimensions are unlike.
    """
    if positions is None:
        return torch.arange(length, length + num_new).repeat(num_rows)
    if positions.dim() == 3:
        told = positions[1:] if len(positions) == 4 else positions
        if not len(told) or not bool((told == told[0]).all()):
            return None
        positions = told[0]
    if positions.dim() > 2 or positions.numel() not in (num_new, num_rows * num_new):
        return None
    return positions.reshape(-1).expand(num_rows * num_new)


def may_decode() -> bool:
    """Whether nothing in this thread asks torch for more than values: no gradients, autocast, compilation or modes."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return False
    modes = [torch._C._get_function_stack_at(place) for place in range(torch._C._len_torch_function_stack())]
    return all(type(mode) is DeviceContext for mode in modes)


def _is_whole(given: Any) -> bool:
    return isinstance(given, torch.Tensor) and given.dtype in _WHOLE and given.is_cpu


def _is_count(given: Any) -> bool:
    return isinstance(given, int) and given >= 0


def refusal(kwargs: dict[str, Any]) -> str | None:
    """Say why a call for new tokens of each sequence is none for a program; None for other calls."""
    ids, cache = kwargs.get("input_ids"), kwargs.get("cache", kwargs.get("past_key_values"))
    if hasattr(cache, "describe_pass"):
        return None  # of the engine's passes, whose sequences have no one length
    try:
        if not isinstance(cache, Cache) or not cache.get_seq_length():
            return None
    except ValueError:  # a cache without positions
        return None
    if not isinstance(ids, torch.Tensor) or ids.shape[-1:] != (1,):
        return "its last call was for several new tokens, or for none by number"
    if type(cache) is not GrowingCache:
        return f"it is called with a {type(cache).__name__}, which is not moeflow's cache"
    return "its last call asked for more than logits and a cache"


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
        """Return an output of logits [sequences, tokens, V] and the cache."""
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

    replaced: Any = forward
    replaced.__signature__ = inspect.signature(model.forward)
    changed.forward = forward
    give_caches(model, lambda cache, *_: GrowingCache.in_place_of(cache))


def give_caches(model: PreTrainedModel, in_place_of: Callable[[object, Any, Any], Cache | None]) -> None:
    """Let `generate` use other caches than it made itself.

    Args:
        model: whose `generate` is changed.
        in_place_of: takes a cache that was made, the generation config and the generation mode; returns the one to use
            in its place, or None.
    """
    behind = weakref.ref(model)
    changed: Any = model
    kind: Any = type(model)

    def prepare_cache(settings: Any, model_kwargs: dict[str, Any], mode: Any, *args: Any, **kwargs: Any) -> Any:
        given = {name for name in _CACHE_NAMES if model_kwargs.get(name) is not None}
        prepare = kind._prepare_cache_for_generation
        result = prepare(behind(), settings, model_kwargs, mode, *args, **kwargs)
        for name in set(_CACHE_NAMES) - given:
            other = in_place_of(model_kwargs.get(name), settings, mode)
            if other is not None:
                model_kwargs[name] = other
        return result

    changed._prepare_cache_for_generation = prepare_cache
