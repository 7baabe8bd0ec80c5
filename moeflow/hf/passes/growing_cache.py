"""A key-value cache in memory that grows by doubling, so that a step writes new keys and values where they stay."""

from collections import deque
from collections.abc import Iterable
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_FIRST_POSITIONS = 64


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
        self.length = max(self.length + tokens_to_remove, 0)
        if self._is_lent:
            self._end_memory()

    def make_room(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the memory, with room for one more position."""
        assert self._memory is not None
        self._make_room(self.length + 1, *self._memory)
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
        capacity = max(_FIRST_POSITIONS, 1 << (end - 1).bit_length())
        keys, values = (new.new_empty(new.shape[0], new.shape[1], capacity, new.shape[3]) for new in like)
        if self._memory is not None:
            for new, old in zip((keys, values), self._memory, strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
        self._hold((keys, values), self.length)

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


class GrowingCache(DynamicCache):
    """A cache of growing layers, in place of one that transformers made."""

    def __init__(self, num_layers: int) -> None:
        Cache.__init__(self, layers=[GrowingLayer() for _ in range(num_layers)])
        self._table = np.zeros((0, 0, 3), np.int64)
        self._places: list[tuple[int, int, int]] = []  # of the table

    @classmethod
    def in_place_of(cls, cache: object) -> "GrowingCache | None":
        """Return a cache for one that is empty and keeps nothing but keys and values; None for others."""
        plain = (DynamicLayer, DynamicSlidingWindowLayer)
        if type(cache) is not DynamicCache or cache.offloading or any(type(one) not in plain for one in cache.layers):
            return None
        if cache.get_seq_length() or not cache.layers:
            return None
        return cls(len(cache.layers))

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> "GrowingCache | None":
        """Return an empty cache for a model; None where it keeps other state than keys and values."""
        return cls.in_place_of(DynamicCache(config=model.config.get_text_config(decoder=True)))

    @property
    def length(self) -> int:
        """Positions kept."""
        return int(self.get_seq_length())

    def fits(self, layers: dict[int, KeptShape], num_rows: int) -> bool:
        """Whether each of these layers keeps the same positions of so many sequences, in these shapes.

        Args:
            layers: by their numbers.
            num_rows: sequences.
        """
        if max(layers, default=-1) >= len(self.layers):
            return False
        length = self.length
        for number, shape in layers.items():
            layer: Any = self.layers[number]
            if type(layer) is not GrowingLayer or layer.length != length or layer.form != (num_rows, shape):
                return False
        return True

    def table(self, layers: Iterable[int]) -> np.ndarray:
        """Return where keys and values of these layers lie, with room for one more position.

        Args:
            layers: their numbers; the cache fits them.

        Returns:
            [layers, batch, 3] int64: addresses of keys and of values, and the positions that there is room for.
        """
        growing: list[GrowingLayer] = [self.layers[number] for number in layers]  # type: ignore[misc]
        memories = [layer.make_room() for layer in growing]
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

    def advance(self, layers: Iterable[int]) -> None:
        """Count the position that a step has written. No interrupt comes in between: no line of Python runs."""
        growing = [self.layers[number] for number in layers]
        deque(map(setattr, growing, repeat("length"), repeat(self.length + 1)), maxlen=0)
