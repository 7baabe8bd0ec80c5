"""The memory that a model's experts take, and the slots that a budget buys.

Knows layouts. Knows nothing of devices or of what is free.
"""

from dataclasses import dataclass

from moeflow.core import PAGE_BYTES, LayerLayout, align_up
from moeflow.errors import BudgetError
from moeflow.memory_size import MemorySize, parse_memory

_HOST_SHARE = 0.6  # of the free host memory that "auto" pins
_LEAST_POSITIONS = 256  # of one sequence, which one budget of experts and keys and values must have room for


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

    def host_slots_for(
        self, host_memory: MemorySize, *, free_bytes: int, reads_in_flight: int, all_on_device: bool
    ) -> int:
        """Return how many slots the pinned tier has between the disk and a GPU.

        Args:
            host_memory: the option.
            free_bytes: of host memory.
            reads_in_flight: each passes through a slot.
            all_on_device: whether every expert has a slot there, so that none comes back to the host.

        Raises:
            BudgetError: fewer than the reads in flight.
        """
        least = min(reads_in_flight, self.num_experts)
        if host_memory == "auto":
            wanted = 0 if all_on_device else int(_HOST_SHARE * free_bytes) // self.slot_bytes
            return min(max(wanted, least), self.num_experts)
        budget = parse_memory(host_memory, name="host_memory", whole_bytes=self.all_bytes)
        if budget < least * self.slot_bytes:
            raise BudgetError(
                f"host_memory of {budget:,} bytes is below the minimum of {least * self.slot_bytes:,}: every read in "
                "flight passes through a pinned slot. Give at least that."
            )
        return min(budget // self.slot_bytes, self.num_experts)

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


def check_shared(total_bytes: int, size: ExpertsSize, bytes_per_position: int) -> None:
    """Refuse one budget of experts and keys and values that is too small for a short sequence.

    Args:
        total_bytes: of both.
        size: of the experts.
        bytes_per_position: of keys and values; 0 where that is not known.

    Raises:
        BudgetError: the message has both minima.
    """
    sequence_bytes = _LEAST_POSITIONS * bytes_per_position
    if total_bytes < size.min_bytes + sequence_bytes:
        raise BudgetError(
            f"memory of {total_bytes:,} bytes is too small: the fewest experts take {size.min_bytes:,} bytes "
            f"({size.min_slots} slots), and the keys and values of one sequence of {_LEAST_POSITIONS} positions "
            f"{sequence_bytes:,}. Give {size.min_bytes + sequence_bytes:,} at least; all experts take "
            f"{size.all_bytes:,}."
        )
