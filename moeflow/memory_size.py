"""Options of load_moe, checked once: memory sizes as people write them, and the budget they buy."""

import re
from dataclasses import dataclass

from moeflow.core import PAGE_BYTES, LayerLayout, align_up
from moeflow.errors import BudgetError, ConfigError

MemorySize = int | float | str

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}iB"] = 1024**_power
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*|%)\s*$")


def parse_memory(value: MemorySize, *, name: str, whole_bytes: int) -> int:
    """Turn "6GiB", "600MB", "25%" or a number of bytes into bytes.

    Args:
        value: what the user wrote.
        name: the option's name, for the message.
        whole_bytes: what 100 % stands for: the bytes of all routed experts.

    Raises:
        ConfigError: not a size.
    """
    allowed = f'{name} takes bytes, "6GiB", "600MB", "25%" (of all experts) or "auto"'
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ConfigError(f"{name}={value!r} is not a memory size: {allowed}.")
    match = _SIZE.match(str(value))
    if not match:
        raise ConfigError(f"{name}={value!r} is not a memory size: {allowed}.")
    number, unit = float(match[1]), match[2]
    if unit == "%":
        if number > 100:
            raise ConfigError(f"{name}={value!r} is more than all experts: give at most 100%.")
        return int(number * whole_bytes / 100)
    if unit not in _UNITS:
        known = ", ".join(unit for unit in _UNITS if unit)
        raise ConfigError(f"{name}={value!r} has an unknown unit {unit!r}. Units: {known}, %.")
    return int(number * _UNITS[unit])


@dataclass(frozen=True)
class ExpertsSize:
    """What the routed experts of a model take.

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
            whole_slots: whether a slot takes the memory of the largest record whoever sits in it, as on a GPU.
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
