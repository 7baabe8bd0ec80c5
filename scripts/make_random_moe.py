"""Write a random mixture-of-experts checkpoint (Qwen3-MoE, bfloat16, no tokenizer) in the hub's layout.

    python scripts/make_random_moe.py OUT [--layers 12 --experts 128 --hidden 2048 --inner 768 ...]

The default has the shape of Qwen3-30B-A3B with 12 of its 48 layers: 16 GB. Weights are drawn piece by piece and written
shard by shard, so that the memory taken does not depend on the model. The same options give the same bytes, whatever
the number of threads; a folder that holds them already is left as it is, and a run that was cut goes on.
"""

import argparse
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from moeflow.atomic_file import atomic_file, write_atomically
from moeflow.errors import ConfigError, MoeflowError

STAMP = "random_moe.json"  # written last: a folder with it is whole
_BEGUN = ".random_moe.begun"  # written first: what lies beside it may be replaced
_PIECE_VALUES = 1 << 21  # drawn at once: 8 MB in float32


class Shape(NamedTuple):
    """Sizes of a model.

    Args:
        layers: all with routed experts.
        experts: of a layer.
        top_k: experts a token is routed to.
        hidden: H.
        inner: I of an expert.
        heads: of attention, `kv_heads` of its keys and values, each `head_dim` wide.
        vocab: tokens.
        context: most positions.
    """

    layers: int = 12
    experts: int = 128
    top_k: int = 8
    hidden: int = 2048
    inner: int = 768
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocab: int = 151936
    context: int = 40960

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return 2 * sum(math.prod(shape) for tensors in self.shards() for _, shape in tensors)

    def shards(self) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
        """Yield (name, shape) of each shard's tensors: one shard for what is outside of the layers, one a layer."""
        yield [
            ("model.embed_tokens.weight", (self.vocab, self.hidden)),
            ("model.norm.weight", (self.hidden,)),
            ("lm_head.weight", (self.vocab, self.hidden)),
        ]
        queries, values = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            tensors = [
                (f"{prefix}.input_layernorm.weight", (self.hidden,)),
                (f"{prefix}.post_attention_layernorm.weight", (self.hidden,)),
                (f"{prefix}.self_attn.q_norm.weight", (self.head_dim,)),
                (f"{prefix}.self_attn.k_norm.weight", (self.head_dim,)),
                (f"{prefix}.self_attn.q_proj.weight", (queries, self.hidden)),
                (f"{prefix}.self_attn.k_proj.weight", (values, self.hidden)),
                (f"{prefix}.self_attn.v_proj.weight", (values, self.hidden)),
                (f"{prefix}.self_attn.o_proj.weight", (self.hidden, queries)),
                (f"{prefix}.mlp.gate.weight", (self.experts, self.hidden)),
            ]
            for expert in range(self.experts):  # the tensors of one expert side by side: one read
                name = f"{prefix}.mlp.experts.{expert}"
                tensors.append((f"{name}.gate_proj.weight", (self.inner, self.hidden)))
                tensors.append((f"{name}.up_proj.weight", (self.inner, self.hidden)))
                tensors.append((f"{name}.down_proj.weight", (self.hidden, self.inner)))
            yield tensors

    def config(self) -> dict:
        """Return the content of config.json."""
        from transformers import Qwen3MoeConfig

        config = Qwen3MoeConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            moe_intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=True,
            max_position_embeddings=self.context,
            architectures=["Qwen3MoeForCausalLM"],
            dtype="bfloat16",
        )
        return config.to_dict()


def write_random_moe(folder: Path, shape: Shape, *, seed: int = 0, threads: int | None = None) -> bool:
    """Write a checkpoint of random weights; return False where the folder holds it already.

    Args:
        folder: to write, made where it is not there.
        shape: of the model.
        seed: of the weights.
        threads: that draw; as many as there are cores when None.

    Raises:
        ConfigError: a size of the shape is none, the folder holds something else, or its disk is too small.
        MoeflowError: the folder cannot be written.
    """
    if min(shape) < 1 or shape.top_k > shape.experts or shape.heads % shape.kv_heads or shape.head_dim % 2:
        raise ConfigError(
            f"{shape} is no model's. Sizes must be 1 or more, top_k at most the number of experts, heads a multiple of "
            "kv_heads, head_dim even."
        )
    stamp = json.dumps({"shape": shape._asdict(), "seed": seed})
    if (folder / STAMP).is_file() and (folder / STAMP).read_text() == stamp:
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise MoeflowError(f"{folder} cannot be made: {error.strerror}. Give a folder of yours.") from error
    if others and _BEGUN not in others:
        raise ConfigError(f"{folder} holds {others[0]}, and no such model. Give an empty folder, or remove it.")
    free = shutil.disk_usage(folder).free
    if free < shape.num_bytes:
        raise ConfigError(
            f"{folder} has {free / 1e9:.1f} GB free, and the model takes {shape.num_bytes / 1e9:.1f} GB. Make room, "
            "give a folder on another disk, or fewer --layers."
        )
    begun = folder / _BEGUN
    goes_on = begun.is_file() and begun.read_text() == stamp  # shards are whole or not there
    write_atomically(begun, stamp)
    threads = threads or len(os.sched_getaffinity(0))
    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(threads) as pool:
        for number, tensors in enumerate(shape.shards()):
            name = f"model-{number + 1:05d}-of-{shape.layers + 1:05d}.safetensors"
            if not (goes_on and (folder / name).is_file()):
                _write_shard(folder / name, tensors, seed, pool, 2 * threads)
            weight_map |= {tensor: name for tensor, _ in tensors}
    index = {"metadata": {"total_size": shape.num_bytes}, "weight_map": weight_map}
    write_atomically(folder / "model.safetensors.index.json", json.dumps(index, indent=1))
    write_atomically(folder / "config.json", json.dumps(shape.config(), indent=1))
    write_atomically(folder / STAMP, stamp)
    begun.unlink()
    return True


def _write_shard(
    path: Path, tensors: list[tuple[str, tuple[int, ...]]], seed: int, pool: ThreadPoolExecutor, at_once: int
) -> None:
    """Write one safetensors file; `at_once` pieces are in memory at a time."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    pieces: list[tuple[int, tuple[int, ...], int, int]] = []  # seed of the tensor, its shape, begin, end
    offset = 0
    for name, shape in tensors:
        count = math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + 2 * count]}
        own = zlib.crc32(name.encode(), seed & 0xFFFFFFFF)
        pieces += [(own, shape, b, min(b + _PIECE_VALUES, count)) for b in range(0, count, _PIECE_VALUES)]
        offset += 2 * count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as partial, open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, len(pieces), at_once):
            for drawn in pool.map(_draw, pieces[begin : begin + at_once]):
                file.write(drawn)


def _draw(piece: tuple[int, tuple[int, ...], int, int]) -> bytes:
    """Draw some values of a tensor: ones of a norm, else uniform values that keep the size of what they multiply."""
    import numpy as np
    import torch

    seed, shape, begin, end = piece
    if len(shape) == 1:
        values = torch.ones(end - begin)
    else:
        drawn = np.random.default_rng((seed, begin)).random(end - begin, dtype=np.float32)
        values = torch.from_numpy(drawn).sub_(0.5).mul_(math.sqrt(12 / shape[1]))
    return values.bfloat16().view(torch.uint8).numpy().tobytes()


def main(argv: list[str] | None = None) -> int:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    for name, value in Shape._field_defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", default=value, help=f"({value})")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of the weights (0)")
    arguments = parser.parse_args(argv)
    shape = Shape(*(getattr(arguments, name) for name in Shape._fields))
    try:
        made = write_random_moe(arguments.out, shape, seed=arguments.seed)
    except MoeflowError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{arguments.out}: {shape.num_bytes:,} bytes {'written' if made else 'are there already'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
