"""The memory of a GPU as a plan: what experts may take beside activations, keys and values, and prefill's outputs.

Plain numbers; the caller measures. Not yet held against a GPU.
"""

from typing import NamedTuple

from moeflow.core import LayerLayout
from moeflow.errors import BudgetError

_SLACK_SHARE = 0.02  # of what is free: the allocator's rounding, workspaces of libraries
_PREFILL_SHARE = 0.1  # of what is free, at most, for the outputs of experts in a prefill
_TOKENS = 128  # prefill is cut at multiples of it


class MemoryNeeds(NamedTuple):
    """What a model needs beside its weights and experts.

    Args:
        activation_bytes: the peak of a pass over the context, without keys and values or experts' outputs.
        key_value_bytes: of the context, or of all sequences of an engine.
        bytes_per_prefill_token: of experts' outputs and of the values between their matrices, K of each a token.
        context: tokens of the longest pass.
    """

    activation_bytes: int
    key_value_bytes: int
    bytes_per_prefill_token: int
    context: int


class DevicePlan(NamedTuple):
    """Where the bytes go. All of them together are at most what was free, unless the user gave the experts more.

    Args:
        expert_bytes: of the arena of slots.
        key_value_bytes: of keys and values; the engine takes no more.
        activation_bytes: of a pass.
        prefill_bytes: of experts' outputs and of the values between their matrices.
        slack_bytes: of the allocator's rounding, and of libraries.
        prefill_tokens: most tokens whose experts' outputs are in memory at once.
    """

    expert_bytes: int
    key_value_bytes: int
    activation_bytes: int
    prefill_bytes: int
    slack_bytes: int
    prefill_tokens: int

    @property
    def reserved_bytes(self) -> int:
        """Bytes of everything but the experts."""
        return self.key_value_bytes + self.activation_bytes + self.prefill_bytes + self.slack_bytes

    def with_rest(self, free_bytes: int) -> "DevicePlan":
        """Give what is left of the free memory to keys and values."""
        rest = max(free_bytes - self.expert_bytes - self.reserved_bytes, 0)
        return self._replace(key_value_bytes=self.key_value_bytes + rest)


def usable_bytes(free_bytes: int, reserved_bytes: int, allocated_bytes: int) -> int:
    """Return what a process can take on a GPU: what the driver has, and what the allocator keeps unused.

    So the budget of a second load does not depend on what the first left in the allocator.

    Args:
        free_bytes: of the driver.
        reserved_bytes: taken from the driver by torch's allocator; `allocated_bytes` of them are in use.
    """
    return free_bytes + reserved_bytes - allocated_bytes


def prefill_bytes_per_token(top_k: int, layout: LayerLayout) -> int:
    """Return the bytes that a token's experts take in a prefill at most: K outputs, K rows between the matrices."""
    record = layout.record
    shapes = {tensor.name: tensor.shape for tensor in record.tensors}
    shapes |= {matrix.name: matrix.shape for matrix in record.matrices}
    return 4 * top_k * sum(shapes.get("down_proj", ()))


def plan_device(
    free_bytes: int,
    needs: MemoryNeeds,
    *,
    all_bytes: int,
    least_bytes: int,
    slot_bytes: int,
    expert_bytes: int | None = None,
) -> DevicePlan:
    """Divide what is free.

    Args:
        free_bytes: beside the dense weights.
        needs: of the model.
        all_bytes: of all experts; `least_bytes` of the fewest, `slot_bytes` of one.
        expert_bytes: of the experts, by the user's word: then keys and values get less where too little is left.

    Raises:
        BudgetError: the fewest experts do not fit beside the rest.
    """
    share = int(_PREFILL_SHARE * free_bytes) // max(needs.bytes_per_prefill_token, 1)
    tokens = min(needs.context, max(share // _TOKENS, 1) * _TOKENS)
    plan = DevicePlan(
        0,
        needs.key_value_bytes,
        needs.activation_bytes,
        tokens * needs.bytes_per_prefill_token,
        int(_SLACK_SHARE * free_bytes),
        tokens,
    )
    reserved = plan.reserved_bytes
    if expert_bytes is not None:
        missing = max(expert_bytes + reserved - free_bytes, 0)
        return plan._replace(expert_bytes=expert_bytes, key_value_bytes=max(plan.key_value_bytes - missing, 0))
    experts = min(max(free_bytes - reserved, 0) // slot_bytes * slot_bytes, all_bytes)
    if experts < least_bytes:
        raise BudgetError(
            f"{free_bytes:,} bytes of the GPU's memory are free beside the dense weights, and {reserved:,} are kept "
            f"for activations of {needs.context:,} tokens, keys and values. The experts need at least {least_bytes:,}. "
            "Free memory on the GPU, give a smaller kv_memory, set expert_memory yourself, or load with device='cpu'."
        )
    return plan._replace(expert_bytes=experts)
