"""Sinks: a query sees the first positions and the last ones; the others are forgotten.

Source: StreamingLLM (Xiao et al. 2024), with the positions' own numbers in place of those in the window.
"""

from typing import Any

import torch

from moeflow.engine.kv_cache.layer_shape import LayerShape, Note
from moeflow.engine.kv_cache.policies.protocol import SeenPositions, SegmentAttention
from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.policy.key_value_policies import SinksOptions, described

_SLACK = 64  # rows beyond those that the next query sees, from which on the others leave


class Sinks:
    """The query at position p sees the first `sinks` positions and the `window` last ones up to p.

    Args:
        options: its sizes.
    """

    name = "sinks"
    forgets = True
    weighs = False

    def __init__(self, options: SinksOptions) -> None:
        self._options = options
        self.seen = SeenPositions()

    def note(self, shape: LayerShape) -> Note | None:
        """Return None: nothing."""
        return None

    def most_rows(self, most_new: int) -> int | None:
        """Return what queries see, the slack and a pass."""
        return self._options.sinks + self._options.window + _SLACK + most_new

    def attend(self, call: SegmentAttention) -> torch.Tensor:
        """Attend to the first positions and the window."""
        first, window = self._options.sinks, self._options.window
        if call.end <= first + window:
            self.seen.add_whole(call)
            return call.exact()
        device = call.keys.device
        queries = torch.arange(call.start, call.end, device=device)[:, None]
        rows = torch.arange(call.keys.shape[2], device=device)
        positions = torch.where(rows < first, rows, rows + call.slot.forgotten)
        allowed = (positions <= queries) & ((positions < first) | (positions > queries - window))
        self.seen.add(int(allowed.sum()) * call.num_heads, call)
        return call.attend_allowed(call.queries, allowed.expand(call.num_heads, -1, -1))

    def let_go(self, slot: KeyValueSlot, num_computed: int) -> None:
        """Let the rows between the first ones and the next query's window go, where they are many."""
        if not num_computed:
            slot.forgotten = 0
        first, before = self._options.sinks, self._options.window - 1
        num_rows = num_computed - slot.forgotten
        if num_rows < first + before + _SLACK:
            return
        rows = torch.cat([torch.arange(first), torch.arange(num_rows - before, num_rows)])
        kept = {layer: rows.to(keys.device).expand(keys.shape[1], -1) for layer, keys in slot.plain_keys.items()}
        slot.let_go(kept, num_computed)

    def described(self) -> dict[str, Any]:
        """Return the name and the sizes."""
        return described(self._options)
