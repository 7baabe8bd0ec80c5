"""The budget of keys and values and the length of a pass, by what was asked for and planned.

Knows options and plans. Knows nothing of slots or sequences.
"""

from moeflow.errors import ConfigError
from moeflow.fit.contract import Contract
from moeflow.hardware import memory_limit_bytes
from moeflow.memory_size import MemorySize, parse_kv_memory
from moeflow.offload.arena.shared_budget import KeyValueShare, SharedBudget

_KEPT_SHARE = 16  # of the memory that the process may use
_AUTO_BYTES = 2 << 30  # kv_memory="auto" takes no more where nothing was planned


def most_kept(kv_memory: MemorySize, model: object) -> int | None:
    """Return the most bytes of what is kept of ended sequences; None for what the budget leaves.

    In host memory, where experts want every byte, "auto" keeps no more than a sixteenth of what the process may use.
    """
    planned = getattr(getattr(model, "moeflow", None), "plan", None) or shared_budget(model)
    return None if kv_memory != "auto" or planned else memory_limit_bytes() // _KEPT_SHARE


def kv_budget(kv_memory: MemorySize, model: object) -> int:
    """Return the bytes that all keys and values may take.

    Args:
        kv_memory: the option; for "auto", what was kept for them when the model was loaded, else 2 GiB.
        model: whose keys and values.

    Raises:
        ConfigError: it is no size, or the model was loaded with one budget of experts and keys and values.
        BudgetError: the model was loaded by a plan, which has less for keys and values.
    """
    if (shared := shared_budget(model)) is not None:
        if kv_memory == "auto":
            return shared.most_key_value_bytes
        raise ConfigError(
            f"kv_memory={kv_memory!r} was given, and the model was loaded with memory={shared.total_bytes:,}, which "
            "experts, keys and values share. Drop kv_memory, or load with expert_memory and kv_memory in its place."
        )
    plan = getattr(getattr(model, "moeflow", None), "plan", None) or {}
    if kv_memory != "auto":
        wanted = parse_kv_memory(kv_memory)
        if isinstance(plan, Contract):
            plan.charge("key_values", wanted)
        return wanted
    return int(plan.get("key_value_bytes", _AUTO_BYTES))


def step_tokens(max_step_tokens: int, max_batch_size: int, model: object) -> int:
    """Return the most tokens of one pass: what was asked for, or less where the model was loaded by a plan.

    Args:
        max_step_tokens: that was asked for.
        max_batch_size: sequences that may decode at once, each with a token.
        model: that runs the passes.
    """
    plan = getattr(getattr(model, "moeflow", None), "plan", None)
    planned = max(plan.pass_tokens, max_batch_size) if isinstance(plan, Contract) else max_step_tokens
    return min(max_step_tokens, planned)


def share_of(model: object) -> KeyValueShare | None:
    """Return a new engine's share of the budget that its model shares with it; None where each has its own."""
    shared, runtime = shared_budget(model), getattr(model, "moeflow", None)
    return None if shared is None or runtime is None else shared.share(runtime)


def shared_budget(model: object) -> SharedBudget | None:
    """Return the budget of experts and keys and values that a model was loaded with; None where it has none."""
    governor = getattr(getattr(model, "moeflow", None), "governor", None)
    return governor if isinstance(governor, SharedBudget) else None
