"""A small model in bfloat16 whose experts pack without loss, but for one; and packed folders that are damaged."""

import json
import shutil
import zlib

import torch

from helpers.small_models import tiny_mixtral
from moeflow.checkpoint.packed_file import PACKED_FILE, PREFIX_BYTES

NOT_WORTH_IT = (1, 2)  # layer and expert that stay bfloat16


def spoilt(model, layer, expert, share):
    """Give a share of one expert's values exponents that no code reaches."""
    weight = model.model.layers[layer].mlp.experts.gate_up_proj.data[expert]
    weight[torch.rand(weight.shape) < share] *= 2.0**-40


def lossless_mixtral(**overrides):
    """Build a Mixtral in bfloat16: an expert with a few escapes, one with signed zeros, one not worth it."""
    model = tiny_mixtral(intermediate_size=128, **overrides).bfloat16()
    spoilt(model, 0, 1, 0.002)
    spoilt(model, *NOT_WORTH_IT, 0.2)
    down = model.model.layers[2].mlp.experts.down_proj.data[7]
    down[0, :3] = torch.tensor([0.0, -0.0, 1e-39])
    return model


def foreign(packed, out, damage):
    """Copy a packed folder and damage its first record under right checksums.

    Args:
        packed: the folder.
        out: its copy, written.
        damage: called with the file's bytes and the places of the record's tensors.
    """
    shutil.copytree(packed, out)
    content = bytearray((out / PACKED_FILE).read_bytes())
    length = int.from_bytes(content[8:16], "little")
    text = bytes(content[PREFIX_BYTES : PREFIX_BYTES + length])
    layer = json.loads(text)["layers"][0]
    record = layer["records"][0]
    begin = int(layer["offset"], 16)
    damage(content, {tensor["name"]: begin + tensor["offset"] for tensor in record["tensors"]})
    new = f"{zlib.crc32(content[begin : begin + record['record_bytes']]):08x}"
    text = text.replace(layer["crc32"][0].encode(), new.encode())
    content[PREFIX_BYTES : PREFIX_BYTES + length] = text
    content[16:20] = zlib.crc32(text).to_bytes(4, "little")
    (out / PACKED_FILE).write_bytes(content)
    return out
