"""Cut every expert of a Mixtral checkpoint in two, so that twice as many are active: finer experts, the same function.

A half keeps half of the neurons; its router row is the whole one's, and its down projection counts twice, since the
router gives each half only half of the weight.
"""

import json
import re
import shutil
from pathlib import Path

from moeflow.atomic_file import atomic_file
from moeflow.checkpoint.headers import open_checkpoint

_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\.w([123])\.weight)")


def cut_experts(checkpoint: Path, target: Path) -> Path:
    """Write the finer checkpoint, unless it lies there from an earlier call.

    Args:
        checkpoint: folder of a Mixtral checkpoint.
        target: folder to write.

    Returns:
        `target`.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    if (target / "config.json").is_file():
        return target
    target.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for file in open_checkpoint(checkpoint).files:
        made = {}
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open's object is no dict
                made.update(_halves(name, tensors.get_tensor(name)))
        weight_map.update(dict.fromkeys(made, file.name))
        with atomic_file(target / file.name) as arriving:
            save_file(made, arriving, metadata={"format": "pt"})
    with atomic_file(target / "model.safetensors.index.json") as arriving:
        arriving.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, target / name)
    config = json.loads((checkpoint / "config.json").read_text())
    config["intermediate_size"] //= 2
    config["num_local_experts"] *= 2
    config["num_experts_per_tok"] *= 2
    with atomic_file(target / "config.json") as arriving:
        arriving.write_text(json.dumps(config, indent=2))
    return target


def _halves(name: str, tensor) -> dict:
    """Return what one tensor of the checkpoint becomes."""
    if name.endswith("block_sparse_moe.gate.weight"):
        return {name: tensor.repeat_interleave(2, 0)}
    found = _EXPERT.fullmatch(name)
    if found is None:
        return {name: tensor}
    before, number, after, matrix = found[1], int(found[2]), found[3], found[4]
    parts = (2 * tensor).chunk(2, 1) if matrix == "2" else tensor.chunk(2, 0)
    return {f"{before}{2 * number + half}{after}": part.contiguous() for half, part in enumerate(parts)}
