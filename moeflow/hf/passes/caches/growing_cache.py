"""A key-value cache in memory that grows by doubling, so that a step writes new keys and values where they stay."""

from collections import deque
from collections.abc import Iterable
from itertools import repeat
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

    Attributes:
        length: positions kept.
        form: sequences, and what is kept of a position; None before the first.
    """

    _first_positions = 64

    def __init__(self) -> None:
        self._memory: tuple[torch.Tensor, torch.Tensor] | None = None
        self._is_lent = False  # whether a caller may hold a view of the memory
        self.length = 0
        self.form: tuple[int, KeptShape] | None = None
        super().__init__()

    def __copy__(self) -> "GrowingLayer":
        """Return a layer that goes on by itself: neither writes what the other keeps."""
        self._end_memory()
        twin = type(self)()
        vars(twin).update(vars(self))
        return twin

    @property
    def keys(self) -> torch.Tensor | None:
        """[batch, heads, length, features]; None before the first."""
        self._is_lent = True
        return None if self._memory is None else self._memory[0][:, :, : self.length]

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        if keys is None:
            self._hold(None, 0)
        else:
            self._hold((keys, keys if self._memory is None else self._memory[1]), keys.shape[2], is_lent=True)

    @property
    def values(self) -> torch.Tensor | None:
        """[batch, heads, length, features]; None before the first."""
        self._is_lent = True
        return None if self._memory is None else self._memory[1][:, :, : self.length]

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        if values is not None:
            assert self._memory is not None
            self._hold((self._memory[0], values), self.length, is_lent=True)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Note that there is something to keep."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep new keys and values, [batch, heads, new, features]; return those of all positions."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end, new = self.length + key_states.shape[2], (key_states, value_states)
        if self._memory is not None and not all(map(_takes, self._memory, new)):  # as transformers has it, or refuses
            old = [memory[:, :, : self.length] for memory in self._memory]
            keys, values = (torch.cat(pair, dim=-2) for pair in zip(old, new, strict=True))
            self._hold((keys, values), end)
            return keys, values
        self._make_room(end, *new)
        assert self._memory is not None
        for memory, added in zip(self._memory, new, strict=True):
            memory[:, :, self.length : end] = added
        self.length = end
        return self._memory[0][:, :, :end], self._memory[1][:, :, :end]

    def get_seq_length(self) -> int:
        """Return how many positions are kept."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; the number is negative, as transformers has it.

        Raises:
            ValueError: it is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of positions to forget, not {tokens_to_remove}.")
        self.length = max(self.length + int(tokens_to_remove), 0)  # of transformers 5.17 it is a tensor
        if self._is_lent:
            self._end_memory()

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

    def _take_rows(self, indices: torch.Tensor) -> None:
        if self._memory is None:
            return
        all_rows = torch.arange(len(self._memory[0]))
        rows = all_rows[indices]
        if torch.equal(rows, all_rows):
            return
        made = []
        for old in self._memory:
            new = old.new_empty(len(rows), *old.shape[1:])
            new[:, :, : self.length] = old[:, :, : self.length].index_select(0, rows)
            made.append(new)
        self._hold((made[0], made[1]), self.length)

    def make_room(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the memory, with room for so many more positions."""
        assert self._memory is not None
        self._make_room(self.length + count, *self._memory)
        return self._memory

    def _make_room(self, end: int, *like: torch.Tensor) -> None:
        is_enough = self._memory is not None and all(
            memory.shape[2] >= end
            and memory.is_contiguous()
            and (not memory.is_inference() or torch.is_inference_mode_enabled())
            for memory in self._memory
        )
        if is_enough:
            return
        keys, values = self._allocate(max(self._first_positions, 1 << (end - 1).bit_length()), *like)
        if self._memory is not None:
            for new, old in zip((keys, values), self._memory, strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
        self._hold((keys, values), self.length)

    def _allocate(self, capacity: int, *like: torch.Tensor) -> list[torch.Tensor]:
        return [new.new_empty(new.shape[0], new.shape[1], capacity, new.shape[3]) for new in like]

    def _hold(self, memory: tuple[torch.Tensor, torch.Tensor] | None, length: int, *, is_lent: bool = False) -> None:
        self._memory, self.length, self._is_lent, self.form = memory, length, is_lent, None
        if memory is not None:
            keys, values = memory
            if keys.dim() == values.dim() == 4 and keys.dtype == values.dtype and keys.shape[:2] == values.shape[:2]:
                shape = KeptShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
                self.form = keys.shape[0], shape

    def _end_memory(self) -> None:
        """Leave no room: what comes next is written to memory of its own."""
        if self._memory is not None:
            keys, values = self._memory
            self._hold((keys[:, :, : self.length], values[:, :, : self.length]), self.length)


def _takes(memory: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether new positions may be written behind those in a memory."""
    is_tracked = torch.is_grad_enabled() and (memory.requires_grad or new.requires_grad)
    is_alike = memory.dtype == new.dtype and memory.shape[:2] == new.shape[:2] and memory.shape[3:] == new.shape[3:]
    return is_alike and not is_tracked


class GrowingHybridLayer(LinearAttentionLayer, GrowingLayer):  # type: ignore[misc, override]  # as transformers' own
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

    record_format = 0  # keys and values are kept as they are

    def __init__(self, layers: list[Any]) -> None:
        Cache.__init__(self, layers=layers)
        self._table = np.zeros((0, 0, 3), np.int64)
        self._places: list[tuple[int, int, int]] = []  # of the table

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

    def table(self, layers: Iterable[int], count: int = 1) -> np.ndarray:
        """Return where keys and values of these layers lie, with room for more positions.

        Args:
            layers: their numbers; the cache fits them.
            count: more positions.

        Returns:
            [layers, rows, 3] int64: addresses of keys and of values, and the positions that there is room for.
        """
        growing: list[GrowingLayer] = [self.layers[number] for number in layers]  # type: ignore[misc]
        if not growing:
            return np.zeros((0, 1, 3), np.int64)
        memories = [layer.make_room(count) for layer in growing]
        places = [(keys.data_ptr(), values.data_ptr(), keys.shape[2]) for keys, values in memories]
        if places != self._places:
            rows = np.arange(memories[0][0].shape[0])
            self._table = np.empty((len(places), len(rows), 3), np.int64)
            for number, (keys, values) in enumerate(memories):
                self._table[number, :, 0] = keys.data_ptr() + rows * keys.stride(0) * keys.element_size()
                self._table[number, :, 1] = values.data_ptr() + rows * values.stride(0) * values.element_size()
                self._table[number, :, 2] = keys.shape[2]
            self._places = places
        return self._table

    def states(self, names: Iterable[StateName]) -> list[torch.Tensor] | None:
        """Return these states where they lie; None where one is not there, or has positions for a later crop."""
        found = [state_of(self.layers, name) for name in names]
        return None if any(one is None for one in found) else found  # type: ignore[return-value]

    def own_layers(self) -> set[int]:
        """Return the numbers of layers that only the model's own code knows."""
        known = (GrowingLayer, GrowingHybridLayer, *STATE_LAYERS)
        return {number for number, layer in enumerate(self.layers) if type(layer) not in known}

    def advance(self, layers: Iterable[int], count: int = 1) -> None:
        """Count the positions that a step has written. No interrupt comes in between: no line of Python runs."""
        growing: list[Any] = [self.layers[number] for number in layers]
        if growing:
            deque(map(setattr, growing, repeat("length"), repeat(growing[0].length + count)), maxlen=0)
