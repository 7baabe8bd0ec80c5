"""The memory that a model's experts take, and the slots that a budget buys.

Knows layouts. Knows nothing of devices or of what is free.
"""

from dataclasses import dataclass

from moeflow.core import PAGE_BYTES, LayerLayout, align_up
from moeflow.errors import BudgetError


@dataclass(frozen=True)
class ExpertsSize:
    """The memory that the routed experts of a model take.

    Args:
        num_experts: routed experts in all layers.
        num_experts_per_tok: the most experts one token takes in one layer.
        slot_bytes: bytes of a slot: the largest record, in whole pages.
        least_bytes: bytes that the smallest expert takes.
        all_bytes: bytes that all experts take.
        pages: [num_layers][num_experts], pages that each expert takes; None where each takes a whole slot.
    """

    num_experts: int
    num_experts_per_tok: int
    slot_bytes: int
    least_bytes: int
    all_bytes: int
    pages: list[list[int]] | None = None

    @classmethod
    def of(cls, layouts: list[LayerLayout], num_experts_per_tok: int, *, whole_slots: bool = False) -> "ExpertsSize":
        """Measure the experts of a model.

        Args:
            layouts: [num_layers].
            num_experts_per_tok: the most experts one token takes in one layer.
            whole_slots: whether every slot takes the memory of the largest record, as on a GPU.
        """
        pages = [
            [
                align_up(layout.record_of(expert).num_bytes, PAGE_BYTES) // PAGE_BYTES
                for expert in range(layout.num_experts)
            ]
            for layout in layouts
        ]
        num_experts, most, least = sum(map(len, pages)), max(map(max, pages)), min(map(min, pages))
        if whole_slots or most == least:
            slot = most * PAGE_BYTES
            return cls(num_experts, num_experts_per_tok, slot, slot, num_experts * slot)
        return cls(
            num_experts,
            num_experts_per_tok,
            most * PAGE_BYTES,
            least * PAGE_BYTES,
            sum(map(sum, pages)) * PAGE_BYTES,
            pages,
        )

    @property
    def min_slots(self) -> int:
        """The fewest slots a token can run with: its own experts in one layer, and one for a read in flight."""
        return min(self.num_experts_per_tok + 1, self.num_experts)

    @property
    def min_bytes(self) -> int:
        """Bytes of `min_slots`."""
        return self.min_slots * self.slot_bytes

    def slots_for(self, budget_bytes: int, *, name: str = "expert_memory") -> int:
        """Return how many slots a budget buys at most.

        Raises:
            BudgetError: too few for a token.
        """
        if budget_bytes < self.min_bytes:
            raise BudgetError(
                f"{name} of {budget_bytes:,} bytes holds {budget_bytes // self.slot_bytes} experts of "
                f"{self.slot_bytes:,} bytes. The minimum is {self.min_bytes:,} bytes: {self.num_experts_per_tok} "
                f"experts of a token in one layer and one for a read in flight. "
                f"All {self.num_experts} experts take {self.all_bytes:,} bytes."
            )
        return min(budget_bytes // self.least_bytes, self.num_experts)
