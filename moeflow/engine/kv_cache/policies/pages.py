"""Pages: all positions are kept, and each query attends to the pages that may matter most to it.

Source: Quest (Tang et al. 2024); pages are chosen for each head of keys, by the largest bound of the query heads that
share it, and for the queries of prompts too.
"""

from typing import Any

import torch

from moeflow.engine.kv_cache.layer_shape import LayerShape, Note
from moeflow.engine.kv_cache.policies.protocol import SeenPositions, SegmentAttention
from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.policy.key_value_policies import PagesOptions, described

_QUERIES = 64  # of a mask


class Pages:
    """A query sees the first page, its own, the one before it, and those that may have the largest products with it.

    What a page's keys have at least and at most in each channel bounds the product of a query with any of them.

    Args:
        options: its sizes.
    """

    name = "pages"
    forgets = False
    weighs = False

    def __init__(self, options: PagesOptions) -> None:
        self._options = options
        self.seen = SeenPositions()

    def note(self, shape: LayerShape) -> Note | None:
        """Return the least and the largest number of each channel of a page's keys."""
        return Note(self._options.page, 2 * shape.key[1], shape.dtype)

    def most_rows(self, most_new: int) -> int | None:
        """Return None: all positions are kept."""
        return None

    def attend(self, call: SegmentAttention) -> torch.Tensor:
        """Attend to the pages that each query chooses."""
        limits = self._limits(call)
        if call.end <= self._options.page * self._options.pages:
            self.seen.add_whole(call)
            return call.exact()
        outputs, num_seen = [], 0
        for at in range(0, call.queries.shape[2], _QUERIES):
            queries = call.queries[:, :, at : at + _QUERIES]
            allowed = self._allowed(call, call.start + at, queries, limits)
            num_seen += int(allowed.sum())
            outputs.append(call.attend_allowed(queries, allowed))
        self.seen.add(num_seen, call)
        return torch.cat(outputs, 1)

    def let_go(self, slot: KeyValueSlot, num_computed: int) -> None:
        """Let nothing go."""

    def described(self) -> dict[str, Any]:
        """Return the name and the sizes."""
        return described(self._options)

    def _limits(self, call: SegmentAttention) -> torch.Tensor:
        """Return the least and the largest numbers of whole pages, [heads, pages, 2 * features].

        Those of pages that end in this pass are made anew where it runs again.
        """
        page = self._options.page
        known, count = min(call.slot.found.get(call.layer, 0), call.start // page), call.end // page
        limits = call.slot.notes[call.layer][0]
        if known < count:
            new = call.keys[0, :, known * page : count * page].unflatten(1, (-1, page))
            limits[:, known:count] = torch.cat([new.amin(2), new.amax(2)], -1)
            call.slot.found[call.layer] = count
        return limits[:, :count]

    def _allowed(self, call: SegmentAttention, first: int, queries: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
        """Return what queries [1, H, count, features] at positions from `first` on see, bool [heads, count, rows]."""
        page, device = self._options.page, queries.device
        positions = torch.arange(first, first + queries.shape[2], device=device)[:, None]
        own = positions // page
        whole = torch.arange(limits.shape[1], device=device)
        may_choose = (whole > 0) & (whole < own - 1)  # [count, whole pages]
        bounds = self._bounds(queries[0].float(), limits.float()).unflatten(0, (call.num_heads, -1)).amax(1)
        order = bounds.masked_fill(~may_choose, float("-inf")).argsort(dim=-1, descending=True, stable=True)
        every = torch.arange(-(-call.end // page), device=device)
        seen = ((every == 0) | (every >= own - 1)).repeat(call.num_heads, 1, 1)
        chosen = order[..., : self._options.pages - 3]
        seen.scatter_(2, chosen, seen.gather(2, chosen) | may_choose.expand_as(bounds).gather(2, chosen))
        keys = torch.arange(call.end, device=device)
        return seen.repeat_interleave(page, -1)[..., : call.end] & (keys <= positions)

    @staticmethod
    def _bounds(queries: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
        """Return the most that a product with a key of each page can be.

        Args:
            queries: [H, count, features].
            limits: [heads, pages, 2 * features].

        Returns:
            [H, count, pages].
        """
        limits = limits.repeat_interleave(len(queries) // len(limits), 0)
        least, most = limits.transpose(1, 2).chunk(2, 1)
        return queries.clamp(min=0) @ most + queries.clamp(max=0) @ least
