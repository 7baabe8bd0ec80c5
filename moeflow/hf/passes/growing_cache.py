"""A key-value cache in memory that grows by doubling, so that a step writes new keys and values where they stay."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from moeflow.hf.passes.kept_state import HYBRID_LAYERS, STATE_LAYERS, StateName, state_of

_FIRST_POSITIONS = 64
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


class KeptShape(NamedTuple):
    """What one layer keeps of a position.

    Args:
        heads: of keys and of values.
        key_features: of a head.
        value_features: of a head.
        dtype: of both.
    """

    heads: int
    key_features: int
    value_features: int
    dtype: torch.dtype


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, [batch, heads, capacity, features], of which the first `length` positions count.

    A layer with a window keeps all positions too: the mask tells which are seen.
    """

    def __init__(self) -> None:
        self._memory: tuple[torch.Tensor, torch.Tensor] | None = None
        self.length = 0
        self.version = 0  # changes with the memory
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:
        """[batch, heads, length, features]; None before the first."""
        return None if self._memory is None else self._memory[0][:, :, : self.length]

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        if keys is None:
            self._memory, self.length = None, 0
        elif self._memory is None:
            self._memory, self.length = (keys, keys), keys.shape[2]
        else:
            self._memory, self.length = (keys, self._memory[1]), keys.shape[2]
        self.version += 1

    @property
    def values(self) -> torch.Tensor | None:
        """[batch, heads, length, features]; None before the first."""
        return None if self._memory is None else self._memory[1][:, :, : self.length]

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        if values is not None:
            assert self._memory is not None
            self._memory = self._memory[0], values
        self.version += 1

    @property
    def form(self) -> tuple[int, KeptShape] | None:
        """Sequences, and what is kept of a position; None before the first."""
        if self._memory is None:
            return None
        keys, values = self._memory
        if keys.dtype != values.dtype or keys.shape[:2] != values.shape[:2]:
            return None
        return keys.shape[0], KeptShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Note that there is something to keep."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep new keys and values, [batch, heads, new, features]; return those of all positions."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self._make_room(end, key_states, value_states)
        assert self._memory is not None
        for memory, new in zip(self._memory, (key_states, value_states), strict=True):
            memory[:, :, self.length : end] = new
        self.length = end
        return self._memory[0][:, :, :end], self._memory[1][:, :, :end]

    def get_seq_length(self) -> int:
        """Return how many positions are kept."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; the number is negative, as transformers has it."""
        self.length = max(self.length - abs(tokens_to_remove), 0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep these sequences in this order, [n]; one may come several times."""
        self._take_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences in this order, [n]."""
        self._take_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Keep each sequence so many times."""
        if self._memory is not None:
            self._take_rows(torch.arange(len(self._memory[0])).repeat_interleave(repeats))

    def _take_rows(self, rows: torch.Tensor) -> None:
        if self._memory is None or torch.equal(rows, torch.arange(len(self._memory[0]))):
            return
        made = []
        for old in self._memory:
            new = old.new_empty(len(rows), *old.shape[1:])
            new[:, :, : self.length] = old[:, :, : self.length].index_select(0, rows)
            made.append(new)
        self._memory = made[0], made[1]
        self.version += 1

    def make_room(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the memory, with room for one more position."""
        assert self._memory is not None
        self._make_room(self.length + 1, *self._memory)
        return self._memory

    def _make_room(self, end: int, *like: torch.Tensor) -> None:
        is_enough = self._memory is not None and all(
            memory.shape[2] >= end and memory.is_contiguous() and memory.shape[0] == new.shape[0]
            for memory, new in zip(self._memory, like, strict=True)
        )
        if is_enough:
            return
        capacity = max(_FIRST_POSITIONS, 1 << (end - 1).bit_length())
        made = [new.new_empty(new.shape[0], new.shape[1], capacity, new.shape[3]) for new in like]
        if self._memory is not None:
            for new, old in zip(made, self._memory, strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
        self._memory = made[0], made[1]
        self.version += 1


class GrowingHybridLayer(LinearAttentionLayer, GrowingLayer):
    """A layer with state tensors beside its keys and values."""

    is_compileable = False

    def __init__(self, number_of_states: int = 1) -> None:
        GrowingLayer.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Make room for a state, by keywords, or note keys and values, by position."""
        of = GrowingLayer if args else LinearAttentionLayer
        of.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        """Forget all."""
        LinearAttentionLayer.reset(self)
        GrowingLayer.reset(self)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:  # type: ignore[override]  # transformers has both
        """Reorder the sequences."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        GrowingLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions, where past states were recorded."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        GrowingLayer.crop(self, tokens_to_remove)


def _growing(layer: Any) -> Any:
    """Return the layer that takes the place of one of transformers'."""
    if type(layer) in HYBRID_LAYERS:
        return GrowingHybridLayer(layer.number_of_states)
    return GrowingLayer() if type(layer) in _PLAIN_LAYERS else layer


class GrowingCache(DynamicCache):
    """A cache of growing layers, in place of one that transformers made; layers of another kind stay its own."""

    def __init__(self, layers: list[Any]) -> None:
        Cache.__init__(self, layers=layers)
        self._table = np.zeros((0, 0, 3), np.int64)
        self._versions: list[tuple[int, int, int]] = []

    @classmethod
    def in_place_of(cls, cache: object) -> "GrowingCache | None":
        """Return a cache for one of transformers' that is empty; None for others, or where no layer has positions."""
        if type(cache) is not DynamicCache or cache.offloading:
            return None
        if not cache.layers and cache.layer_class_to_replicate is DynamicLayer:  # an assistant's
            made = cls([])
            made.layer_class_to_replicate = GrowingLayer
            return made
        if all(type(one) in STATE_LAYERS for one in cache.layers) or cache.get_seq_length():
            return None
        known = (*_PLAIN_LAYERS, *HYBRID_LAYERS, *STATE_LAYERS, DynamicIndexedLayer)
        is_known = all(type(one) in known for one in cache.layers)  # others may look at plain ones beside them
        return cls([_growing(one) for one in cache.layers] if is_known else list(cache.layers))

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> "GrowingCache | None":
        """Return an empty cache for a model; None where no layer of its cache has positions."""
        return cls.in_place_of(DynamicCache(config=model.config.get_text_config(decoder=True)))

    @property
    def length(self) -> int:
        """Positions kept."""
        return int(self.get_seq_length())

    @property
    def lengths(self) -> np.ndarray:
        """Positions kept of each sequence: [1], the same of all."""
        return np.array([self.length])

    def fits(self, layers: dict[int, KeptShape], num_rows: int) -> bool:
        """Whether each of these layers keeps the same positions of so many sequences, in these shapes.

        Args:
            layers: by their numbers.
            num_rows: sequences.
        """
        if max(layers, default=-1) >= len(self.layers):
            return False
        length = self.length
        return all(
            isinstance(layer, GrowingLayer) and layer.length == length and layer.form == (num_rows, shape)
            for layer, shape in ((self.layers[number], shape) for number, shape in layers.items())
        )

    def table(self, layers: Iterable[int]) -> np.ndarray:
        """Return where keys and values of these layers lie, with room for one more position.

        Args:
            layers: their numbers; the cache fits them.

        Returns:
            [layers, rows, 3] int64: addresses of keys and of values, and the positions that there is room for.
        """
        growing: list[GrowingLayer] = [self.layers[number] for number in layers]  # type: ignore[misc]
        memories = [layer.make_room() for layer in growing]
        versions = [
            (layer.version, keys.data_ptr(), values.data_ptr())
            for layer, (keys, values) in zip(growing, memories, strict=True)
        ]
        if versions != self._versions:
            batch = memories[0][0].shape[0]
            rows = np.arange(batch)
            self._table = np.empty((len(memories), batch, 3), np.int64)
            for number, (keys, values) in enumerate(memories):
                self._table[number, :, 0] = keys.data_ptr() + rows * keys.stride(0) * keys.element_size()
                self._table[number, :, 1] = values.data_ptr() + rows * values.stride(0) * values.element_size()
                self._table[number, :, 2] = keys.shape[2]
            self._versions = versions
        return self._table

    def states(self, names: Iterable[StateName]) -> list[torch.Tensor] | None:
        """Return these states where they lie; None where one is not there, or has positions for a later crop."""
        found = [state_of(self.layers, name) for name in names]
        return None if any(one is None for one in found) else found  # type: ignore[return-value]

    def own_layers(self) -> set[int]:
        """Return the numbers of layers that only the model's own code knows."""
        known = (GrowingLayer, GrowingHybridLayer, *STATE_LAYERS)
        return {number for number, layer in enumerate(self.layers) if type(layer) not in known}

    def advance(self, layers: Iterable[int]) -> None:
        """Count the position that a step has written."""
        for number in layers:
            self.layers[number].length += 1  # type: ignore[union-attr]
