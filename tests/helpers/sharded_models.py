"""Checkpoints whose shards are not in the order of layers and share experts among them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file


def reshard(source: Path, folder: Path, shard_of: Callable[[str], int]) -> Path:
    """Write a checkpoint again, in as many shards as `shard_of` names.

    Args:
        source: its folder.
        folder: to write.
        shard_of: tells the shard of each tensor, from 0 up.
    """
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    names = {name: f"model-{shard_of(name) + 1:05}.safetensors" for name in sorted(tensors)}
    for shard in sorted(set(names.values())):
        held = {name: tensor for name, tensor in tensors.items() if names[name] == shard}
        save_file(held, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def straddling(name: str) -> int:
    """Put layers backwards in shards 0 to 3, and of some experts one matrix into the next, or into the first."""
    found = re.search(r"layers\.(\d+)\.", name)
    if found is None:
        return 4
    shard = 3 - int(found[1]) % 4
    numbers = [int(number) for number in re.findall(r"\.(\d+)\.", name)]
    if len(numbers) > 1 and numbers[-1] % 3 == 0 and re.search(r"w2|down_proj", name):
        return (shard + 1) % 5
    if len(numbers) > 1 and numbers[-1] == 7 and re.search(r"w1|gate", name):
        return 0
    return shard
