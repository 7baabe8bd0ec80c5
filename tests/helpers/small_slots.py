"""Slots of a few numbers, written with what tells each position of each sequence of tokens from all others."""

import torch

from moeflow.engine.kv_cache.layer_shape import LayerShape
from moeflow.engine.kv_cache.slots import KeyValueSlot

CPU = torch.device("cpu")
LAYOUT = {
    0: LayerShape((2, 8), (2, 8), torch.float32, CPU),
    1: LayerShape((1, 16), (1, 4), torch.bfloat16, CPU),  # as latent attention has it
}
POSITION = (2 * 8 + 2 * 8) * 4 + (16 + 4) * 2  # bytes
TINY = {0: LayerShape((1, 1), (1, 1), torch.float64, CPU)}
TINY_POSITION = 2 * 8
_names: dict[tuple, int] = {}


def name_of(scaling, beginning):
    """A number of its own for each beginning under each scaling: what its last position's key is."""
    return _names.setdefault((scaling, *beginning), len(_names) + 1)


def write_names(slot, scaling, tokens):
    """Write to a slot of `TINY` what a model would have computed of these tokens."""
    names = [float(name_of(scaling, tokens[: place + 1])) for place in range(len(tokens))]
    row = torch.tensor(names, dtype=torch.float64)[None, None, :, None]
    slot.write(0, 0, row, -row)


def named_slot(scaling, tokens, room=0):
    """A slot of `TINY` with these tokens computed, and room for more."""
    slot = KeyValueSlot.empty(TINY, len(tokens) + room)
    write_names(slot, scaling, tokens)
    return slot


def has_names(slot, scaling, tokens):
    """Whether the first positions of a slot are those of these tokens."""
    keys, values = slot.read(0, len(tokens))
    wanted = [float(name_of(scaling, tokens[: place + 1])) for place in range(len(tokens))]
    return keys.flatten().tolist() == wanted and values.flatten().tolist() == [-one for one in wanted]
