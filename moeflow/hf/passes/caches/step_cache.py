"""A key-value cache whose decode steps run over tensors that stay where they are, as a captured step needs.

A step attends to the whole memory of each layer; the mask, which transformers makes from the position on the device,
hides what is not kept. So captured steps and others have the same arithmetic.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from moeflow.hf.passes.caches.growing_cache import GrowingLayer
from moeflow.hf.passes.forward import ForwardPass

_KINDS = (DynamicLayer, DynamicSlidingWindowLayer)
_MASKING = ("eager", "sdpa")  # attention that obeys a mask; others count positions on the host
_MODES = ("greedy_search", "sample")  # others reorder a cache or take positions back


class _Place:
    """Where the step under way writes, for all layers of a cache: int64 [1] on the device; None between steps."""

    position: torch.Tensor | None = None


class StepLayer(GrowingLayer):
    """A growing layer; in a step it takes and returns the whole of its memory, zeros where nothing was written."""

    _first_positions = 256

    def __init__(self, place: _Place | None = None) -> None:
        self.place = place or _Place()
        self._zeroed: tuple[torch.Tensor, ...] = ()  # memory without garbage behind the positions that are kept
        super().__init__()

    @property
    def memory(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [batch, heads, capacity, features]."""
        assert self._memory is not None
        return self._memory

    def prepare(self) -> bool:
        """Make room for a step; return whether there is anything to go on with."""
        if self._memory is None:
            return False
        if len(self._zeroed) != 2 or any(one is not of for one, of in zip(self._memory, self._zeroed, strict=True)):
            self._end_memory()
        self._make_room(self.length + 1, *self._memory)
        return True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep new keys and values, [batch, heads, new, features]; in a step return the whole memory."""
        if self.place.position is None:
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = self.memory
        keys.index_copy_(2, self.place.position, key_states)
        values.index_copy_(2, self.place.position, value_states)
        return keys, values

    def get_seq_length(self) -> Any:
        """Return how many positions are kept; in a step a tensor on the device, for nothing may wait for it."""
        return self.length if self.place.position is None else self.place.position[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that a mask is for, and the first one's position."""
        if self.place.position is None:
            return self.length + query_length, 0
        return self.memory[0].shape[2], 0

    def _allocate(self, capacity: int, *like: torch.Tensor) -> list[torch.Tensor]:
        made = [new.new_zeros(new.shape[0], new.shape[1], capacity, new.shape[3]) for new in like]
        self._zeroed = tuple(made)
        return made


class StepCache(DynamicCache):
    """A cache of such layers, in place of one that transformers made for `generate`."""

    def __init__(self, num_layers: int) -> None:
        self._place = _Place()
        self._position: torch.Tensor | None = None
        Cache.__init__(self, layers=[StepLayer(self._place) for _ in range(num_layers)])

    @classmethod
    def in_place_of(cls, cache: object, model: PreTrainedModel, settings: Any, mode: Any) -> "StepCache | None":
        """Return a cache for an empty one of transformers'; None where steps over a fixed memory would not be right.

        Args:
            cache: that `generate` made.
            model: that it is for.
            settings: the generation config.
            mode: the generation mode.
        """
        attention = model.config.get_text_config(decoder=True)._attn_implementation
        is_plain = type(cache) is DynamicCache and not cache.offloading and bool(cache.layers)
        if not is_plain or attention not in _MASKING or getattr(mode, "value", mode) not in _MODES:
            return None
        assert isinstance(cache, DynamicCache)
        if settings.output_attentions or cache.get_seq_length() or any(type(one) not in _KINDS for one in cache.layers):
            return None
        return cls(len(cache.layers))

    @property
    def may_run_again(self) -> bool:
        """Whether a pass under way may be run again as it is: a step writes where it wrote before."""
        return self._place.position is not None

    @property
    def is_compileable(self) -> bool:
        """Whether masks are always tensors, and never left out by what is in them; `generate` must not see this."""
        return self._place.position is not None

    @property
    def memory(self) -> list[torch.Tensor]:
        """Keys and values of all layers, and the position: what a captured step reads and writes."""
        assert self._position is not None
        layers: list[Any] = self.layers
        return [self._position, *(tensor for layer in layers for tensor in layer.memory)]

    @property
    def capacity(self) -> int:
        """Positions that there is memory for."""
        first: Any = self.layers[0]
        return first.memory[0].shape[2]

    def begin_step(self) -> bool:
        """Begin a step; return whether its layers keep the same positions, so that it may."""
        layers: list[Any] = self.layers
        lengths = {layer.length for layer in layers if type(layer) is StepLayer and layer.place is self._place}
        if len(lengths) != 1 or any(type(layer) is not StepLayer or not layer.prepare() for layer in layers):
            return False
        if len({layer.memory[0].shape[2] for layer in layers}) != 1:
            return False
        device = layers[0].memory[0].device
        if self._position is None or self._position.device != device:
            self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._position.fill_(lengths.pop())
        self._place.position = self._position
        return True

    def end_step(self, *, is_kept: bool) -> None:
        """End a step, and count its position if it is kept."""
        self._place.position = None
        layers: list[Any] = self.layers
        if is_kept:
            for layer in layers:
                layer.length += 1


@contextmanager
def stepping(begun: ForwardPass) -> Iterator[StepCache | None]:
    """Run a decode pass of one position over the whole memory of its cache.

    Args:
        begun: the pass.

    Yields:
        Its cache; None where it is of another kind, so that nothing is done. A pass that fails leaves it as it was.
    """
    cache, mask = begun.cache, begun.attention_mask
    is_plain = mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2)
    if not isinstance(cache, StepCache) or not is_plain or not cache.begin_step():
        yield None
        return
    is_kept = False
    try:
        yield cache
        is_kept = True
    finally:
        cache.end_step(is_kept=is_kept)
