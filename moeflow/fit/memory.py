"""The memory of a process by lines: dense weights, experts, keys and values, activations, workspace, staging, process.

Arithmetic that loading follows too. Knows bytes. Knows nothing of speed.
"""

from typing import NamedTuple

from moeflow.core import DTYPE_BYTES, align_up
from moeflow.fit.formats import StoredAs
from moeflow.fit.sizes import ModelSizes

LINES = ("dense", "experts", "key_values", "activations", "workspace", "pinned", "process")
READ_THREADS = 4  # experts read at a time, each into a buffer of its own
RESERVE_BYTES = 192 << 20  # "auto" leaves them at first to what is no expert: tokenizer, activations, programs, slack
SPARE_SHARE = 0.03  # of a machine's memory that no plan takes: peaks were up to this much above their plan
_STAGING_ALIGNMENT = 2 << 20  # of a buffer: a huge page
# Resident memory of Python with torch, transformers and moeflow after the answers of a model without weights, at the
# least, with some room for the capture of its decode step: on x86-64 with torch 2.13 and transformers 5.24 it was
# 529 MB, 570 where the step was captured. A machine's profile may know more.
PROCESS_BYTES = 550_000_000
LOADING_BYTES = 60_000_000  # that loading adds to a process which has imported torch and transformers already
_PROGRAM_LAYER_BYTES = 200_000  # of a decode step's program and its buffers
_HIDDEN_COPIES = 12  # tensors [tokens, hidden_size] in float32 that a layer has at once
MOST_STEP_TOKENS = 512  # of a pass of the engine with several sequences


class Budget(NamedTuple):
    """What experts may take at first under expert_memory="auto".

    Args:
        expert_bytes: for experts; may be below what a token needs.
        reserved_bytes: kept for all else.
    """

    expert_bytes: int
    reserved_bytes: int


def auto_budget(free_bytes: int, *, slot_bytes: int, all_bytes: int, key_value_bytes: int) -> Budget:
    """Divide the memory that is free in a process that has its dense weights.

    Args:
        free_bytes: of memory.
        slot_bytes: of the largest expert.
        all_bytes: of all experts.
        key_value_bytes: kept for keys and values.
    """
    reserved = RESERVE_BYTES + READ_THREADS * slot_bytes + key_value_bytes
    return Budget(min(max(free_bytes - reserved, 0), all_bytes), reserved)


def staging_bytes(slot_bytes: int) -> int:
    """Return the bytes of the buffers that experts pass through as they are read."""
    return READ_THREADS * align_up(slot_bytes, _STAGING_ALIGNMENT)


def pass_tokens(context: int, batch: int) -> int:
    """Return the tokens of the longest pass: a prompt of one sequence, or a step of several.

    Args:
        context: positions of a sequence.
        batch: sequences at once.
    """
    return context if batch == 1 else min(context * batch, MOST_STEP_TOKENS)


def memory_lines(
    sizes: ModelSizes,
    form: StoredAs,
    expert_bytes: int,
    *,
    context: int,
    batch: int = 1,
    process_bytes: int = 0,
) -> dict[str, int]:
    """Return the bytes of each line.

    Args:
        sizes: of the model.
        form: how experts are stored.
        expert_bytes: that experts may take.
        context: positions of a sequence.
        batch: sequences at once.
        process_bytes: of a process without weights, as measured; the constant where that is less.
    """
    config, slot = sizes.config, sizes.slot_bytes(form)
    tokens = pass_tokens(context, batch)
    widest = max(max(shape[-2:], default=0) for layer in sizes.layers for shape in layer.shapes)
    per_token = 4 * (_HIDDEN_COPIES * config.hidden_size + 2 * sizes.top_k * (config.hidden_size + widest))
    return {
        "dense": sizes.dense_in_memory(form),
        "experts": expert_bytes,
        "key_values": batch * sizes.key_value_bytes(context, tokens),
        "activations": tokens * per_token + batch * config.vocab_size * DTYPE_BYTES["F32"],
        "workspace": config.num_layers * _PROGRAM_LAYER_BYTES,
        "pinned": staging_bytes(slot),
        "process": max(process_bytes, PROCESS_BYTES),
    }


def most_expert_bytes(lines: dict[str, int], memory_bytes: int) -> int:
    """Return the bytes that experts may take beside the other lines, so that the whole fits; may be negative."""
    others = sum(value for name, value in lines.items() if name != "experts")
    return usable(memory_bytes) - others


def usable(memory_bytes: int) -> int:
    """Return what a plan may take of a machine's memory."""
    return int(memory_bytes * (1 - SPARE_SHARE))
