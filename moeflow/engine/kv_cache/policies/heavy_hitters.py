"""Heavy hitters: the positions that got most attention stay, with the most recent ones; the others are forgotten.

Source: H2O (Zhang et al. 2023); each head of keys has a budget of its own, in which the attention of the query heads
that share it is added.
"""

from typing import Any, NamedTuple

import torch

from moeflow.engine.kv_cache.layer_shape import LayerShape, Note
from moeflow.engine.kv_cache.policies.protocol import SeenPositions, SegmentAttention
from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.engine.kv_cache.windows import chosen_rows
from moeflow.policy.key_value_policies import HeavyHittersOptions, described


class _Found(NamedTuple):
    """What a pass found in one layer.

    Args:
        end: positions that there are behind the pass.
        rows: that stay, [heads, as many in all layers]; None for all.
        masses: the attention that each row has got, [heads, rows before any leave].
    """

    end: int
    rows: torch.Tensor | None
    masses: torch.Tensor


class HeavyHitters:
    """At positions that are multiples of `block`, each head of keys forgets all but `budget` of its positions.

    The last `recent` stay, and of the others those with the largest sum of the weights by which queries saw them; of
    equal ones the earlier.

    Args:
        options: its sizes.
    """

    name = "heavy_hitters"
    forgets = True
    weighs = True

    def __init__(self, options: HeavyHittersOptions) -> None:
        self._options = options
        self.seen = SeenPositions()

    def note(self, shape: LayerShape) -> Note | None:
        """Return one number of each head and row: its attention so far."""
        return Note(1, 1, torch.float32)

    def most_rows(self, most_new: int) -> int | None:
        """Return the budget, a block and a pass."""
        return self._options.budget + self._options.block + most_new

    def attend(self, call: SegmentAttention) -> torch.Tensor:
        """Attend to what is not forgotten, and add up the weights."""
        num_old, forgotten = call.start - call.slot.forgotten, call.slot.forgotten
        masses = call.keys.new_zeros(call.num_heads, call.end - forgotten, dtype=torch.float32)
        masses[:, :num_old] = call.slot.notes[call.layer][0, :, :num_old, 0]
        every = torch.arange(call.end - forgotten, device=call.keys.device).expand(call.num_heads, -1)
        stays, outputs, at, num_seen = every[:, :num_old], [], call.start, 0
        while at < call.end:
            cut, leaves = self._next_cut(at, stays.shape[1], call.end)
            rows = torch.cat([stays, every[:, at - forgotten : cut - forgotten]], 1)
            outputs.append(self._attend_rows(call, at, cut, rows, masses))
            num_seen += (cut - at) * (rows.shape[1] + stays.shape[1] + 1) // 2
            stays, at = self._heaviest(rows, masses) if leaves else rows, cut
        self.seen.add(num_seen * call.num_heads, call)
        all_stay = stays.shape[1] == every.shape[1]
        call.slot.found[call.layer] = _Found(call.end, None if all_stay else stays, masses)
        return torch.cat(outputs, 1)

    def let_go(self, slot: KeyValueSlot, num_computed: int) -> None:
        """Let the rows go that the pass before found to be forgotten, where the sequence went on from it."""
        if not num_computed:
            slot.forgotten = 0
        found: dict[int, _Found] = {layer: one for layer, one in slot.found.items() if one.end == num_computed}
        slot.found.clear()
        for layer, one in found.items():
            slot.notes[layer][0, :, : one.masses.shape[1], 0] = one.masses
        kept = {layer: one.rows for layer, one in found.items() if one.rows is not None}
        if kept:
            slot.let_go(kept, num_computed)

    def described(self) -> dict[str, Any]:
        """Return the name and the sizes."""
        return described(self._options)

    def _next_cut(self, at: int, num_rows: int, end: int) -> tuple[int, bool]:
        """Return the position up to which queries see so many rows and those between, and whether some leave there."""
        block = self._options.block
        full = at + max(1, self._options.budget + 1 - num_rows)
        cut = -(-full // block) * block
        return (cut, True) if cut <= end else (end, False)

    def _attend_rows(
        self, call: SegmentAttention, at: int, cut: int, rows: torch.Tensor, masses: torch.Tensor
    ) -> torch.Tensor:
        """Attend with the queries from `at` to `cut`, of which the last rows are; add the weights to the masses."""
        queries = call.queries[:, :, at - call.start : cut - call.start]
        num_new, num_rows = queries.shape[2], rows.shape[1]
        allowed = None
        if num_new > 1:
            allowed = torch.ones(num_new, num_rows, dtype=torch.bool, device=rows.device).tril(num_rows - num_new)
            allowed = allowed[None, None]
        is_whole = num_rows == call.keys.shape[2]
        keys = call.keys if is_whole else chosen_rows(call.keys, rows)
        values = call.values if is_whole else chosen_rows(call.values, rows)
        weights = call.weigh(queries, keys, values, allowed)[0].float()
        masses.scatter_add_(1, rows, weights.sum(1).view(call.num_heads, call.group, -1).sum(1))
        if is_whole and not call.slot.forgotten:
            return call.exact()
        return call.attend(queries, keys, values, allowed)

    def _heaviest(self, rows: torch.Tensor, masses: torch.Tensor) -> torch.Tensor:
        """Return the rows that stay, [heads, budget], in their order."""
        recent = rows[:, rows.shape[1] - self._options.recent :]
        others = rows[:, : rows.shape[1] - self._options.recent]
        order = masses.gather(1, others).argsort(dim=1, descending=True, stable=True)
        best = order[:, : self._options.budget - self._options.recent].sort(1).values
        return torch.cat([others.gather(1, best), recent], 1)
