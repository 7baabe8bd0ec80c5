"""The GPU of one model while it is loaded: what the first pass told, and how its memory is divided.

Not yet run on a GPU.
"""

from typing import Any, NamedTuple

from transformers import PreTrainedModel

from moeflow.core import LayerLayout
from moeflow.errors import BudgetError
from moeflow.loading.budget import ExpertsSize
from moeflow.loading.device_plan import DevicePlan, MemoryNeeds, plan_device, prefill_bytes_per_token
from moeflow.loading.gpu_memory import GpuMemory
from moeflow.loading.options import LoadOptions
from moeflow.loading.warm_up import WarmUp, warm_up
from moeflow.memory_size import parse_kv_memory, parse_memory

_POSITIONS = 4096  # of the context where no other is asked for; of longer prompts experts run a part at a time
_ACTIVATION_BYTES = 192 << 20  # where they could not be measured
_KEY_VALUE_BYTES = 256 << 20  # where a family does not tell what a position takes


class Gpu(NamedTuple):
    """A GPU with a model's dense weights on it, and no expert.

    Args:
        memory: its counters.
        warmed: what the first pass told.
        key_value_bytes: of keys and values, wanted.
    """

    memory: GpuMemory
    warmed: WarmUp
    key_value_bytes: int

    @classmethod
    def of(cls, model: PreTrainedModel, memory: GpuMemory, options: LoadOptions, bytes_per_position: int) -> "Gpu":
        """Run a model's first pass, over as many positions as keys and values are to be kept of.

        Args:
            model: its experts taken off, with nothing behind them yet.
            memory: of its GPU.
            options: of load_moe.
            bytes_per_position: of key-value cache; 0 where a family does not tell.
        """
        if options.kv_memory == "auto":
            wanted = _POSITIONS * bytes_per_position or _KEY_VALUE_BYTES
            return cls(memory, warm_up(model, memory, _POSITIONS), wanted)
        wanted = parse_kv_memory(options.kv_memory)
        context = wanted // bytes_per_position if bytes_per_position else _POSITIONS
        return cls(memory, warm_up(model, memory, max(context, 1)), wanted)

    def divide(self, size: ExpertsSize, layout: LayerLayout, options: LoadOptions) -> DevicePlan:
        """Divide what is free beside the dense weights.

        Args:
            size: of the experts; `layout` of one layer of them.
            options: of load_moe; an expert_memory in bytes is kept.

        Raises:
            BudgetError: the parts do not fit.
        """
        peak, expert_bytes = self.warmed.peak_bytes, None
        if options.expert_memory != "auto":
            asked = parse_memory(options.expert_memory, name="expert_memory", whole_bytes=size.all_bytes)
            expert_bytes = size.slots_for(asked) * size.slot_bytes
        needs = MemoryNeeds(
            activation_bytes=_ACTIVATION_BYTES if peak is None else peak,
            key_value_bytes=self.key_value_bytes,
            bytes_per_prefill_token=prefill_bytes_per_token(size.num_experts_per_tok, layout),
            context=self.warmed.context,
        )
        free = self.memory.free_bytes()
        plan = plan_device(
            free,
            needs,
            all_bytes=size.all_bytes,
            least_bytes=size.min_bytes,
            slot_bytes=size.slot_bytes,
            expert_bytes=expert_bytes,
        )
        if options.kv_memory == "auto":
            return plan.with_rest(free) if expert_bytes is not None or plan.expert_bytes == size.all_bytes else plan
        if plan.key_value_bytes < self.key_value_bytes:
            raise BudgetError(
                f"kv_memory of {self.key_value_bytes:,} bytes and expert_memory of {plan.expert_bytes:,} do not fit "
                f"into the {free:,} bytes of the GPU's memory that are free beside the dense weights: activations and "
                f"experts' outputs take {plan.reserved_bytes - plan.key_value_bytes:,}. Give less to one of them."
            )
        return plan

    def describe(self, plan: DevicePlan) -> dict[str, Any]:
        """Return the lines of a plan, and where the size of activations comes from."""
        lines = {name: value for name, value in plan._asdict().items() if name.endswith("_bytes")}
        failure = self.warmed.failure
        source = "measured" if failure is None else f"estimated, since a first pass failed: {failure}"
        return {**lines, "context": self.warmed.context, "activations": source}
