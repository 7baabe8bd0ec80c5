"""The converted model on disk: a Mixtral checkpoint in the hub's layout, written piece by piece.

Every weight file appears by rename after its bytes reached the disk, so a file with its final name is whole.
Knows files. Knows nothing of how the experts were made.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeflow.atomic_file import atomic_file, write_atomically
from moeflow.checkpoint.headers import read_header
from moeflow.demo.recipe import Recipe, SplitFfn

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, MixtralConfig

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


def write_layer(path: Path, layer: int, dense_layer: Any, split: SplitFfn) -> None:
    """Write one layer's tensors, under the hub's Mixtral names, as one safetensors file.

    Args:
        path: the file.
        layer: index of the layer.
        dense_layer: the dense decoder layer, for attention, norms and the kept neurons.
        split: the layer's experts.
    """
    prefix = f"model.layers.{layer}"
    tensors = {f"{prefix}.{name}.weight": dense_layer.get_submodule(name).weight for name in _ATTENTION + _NORMS}
    moe = f"{prefix}.block_sparse_moe"
    tensors[f"{moe}.gate.weight"] = split.router
    for expert, neurons in enumerate(split.neurons):
        tensors[f"{moe}.experts.{expert}.w1.weight"] = dense_layer.mlp.gate_proj.weight[neurons]
        tensors[f"{moe}.experts.{expert}.w2.weight"] = split.down_proj[expert].T
        tensors[f"{moe}.experts.{expert}.w3.weight"] = dense_layer.mlp.up_proj.weight[neurons]
    # The neuron choice goes along for a build that continues; the finished checkpoint does not carry it.
    write_tensors(path, tensors, neurons=split.neurons)


def read_layer(path: Path, layer: int, num_experts: int) -> SplitFfn:
    """Read back the experts that `write_layer` wrote.

    Args:
        path: the file.
        layer: index of the layer.
        num_experts: experts of one layer.
    """
    import torch
    from safetensors import safe_open

    moe = f"model.layers.{layer}.block_sparse_moe"
    with safe_open(path, "pt") as file:
        down = [file.get_tensor(f"{moe}.experts.{e}.w2.weight").T.contiguous() for e in range(num_experts)]
        return SplitFfn(file.get_tensor(f"{moe}.gate.weight"), file.get_tensor("neurons"), torch.stack(down))


def write_shards(
    folder: Path, layer_files: list[Path], model: Any, num_shards: int, on_shard: Callable[[], None] = lambda: None
) -> None:
    """Gather the layers' files into the checkpoint's shards and index, and drop each file once its shard is there.

    Args:
        folder: the checkpoint's folder.
        layer_files: one file a layer, in order; those of shards already written may be gone.
        model: the dense model, for embeddings and the final norm.
        num_shards: how many shards.
        on_shard: called after each shard.
    """
    from safetensors.torch import load_file

    num_shards = min(num_shards, len(layer_files))
    bounds = [len(layer_files) * i // num_shards for i in range(num_shards + 1)]
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for shard in range(num_shards):
        path = folder / f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        mine = layer_files[bounds[shard] : bounds[shard + 1]]
        if not path.exists():
            tensors = _outer_tensors(model) if shard == 0 else {}
            for layer_file in mine:
                tensors |= load_file(layer_file)
                tensors.pop("neurons")
            write_tensors(path, tensors)
            del tensors
        for layer_file in mine:
            layer_file.unlink(missing_ok=True)
        header = read_header(path)
        weight_map |= dict.fromkeys(header, path.name)
        total_bytes += sum(entry.num_bytes for entry in header.values())
        on_shard()
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_atomically(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n", None)


def mixtral_config(dense: "LlamaConfig", recipe: Recipe) -> "MixtralConfig":
    """Return the Mixtral configuration of a converted Llama.

    Args:
        dense: the Llama's configuration.
        recipe: sizes of the experts.
    """
    from transformers import MixtralConfig

    kept = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "hidden_act", "max_position_embeddings", "initializer_range", "rope_parameters", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return MixtralConfig(
        **{name: getattr(dense, name) for name in kept},
        intermediate_size=recipe.expert_size,
        num_local_experts=recipe.num_experts,
        num_experts_per_tok=recipe.num_experts_per_tok,
        rms_norm_eps=float(f"{dense.rms_norm_eps:.6g}"),  # a GGUF keeps it in float32
        sliding_window=None,
        architectures=["MixtralForCausalLM"],
        dtype="bfloat16",
    )


def write_tensors(path: Path, tensors: dict[str, "torch.Tensor"], **as_they_are: "torch.Tensor") -> None:
    """Write tensors in bfloat16, and others as they are, to a file that appears whole.

    Args:
        path: the file.
        tensors: tensors by name.
        **as_they_are: tensors whose dtype is kept.
    """
    from safetensors.torch import save_file

    # save_file orders by dtype and name, which puts one expert's w1, w2, w3 side by side: one read an expert.
    rounded = {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path, None) as partial:
        save_file(rounded | as_they_are, partial, metadata={"format": "pt"})


def _outer_tensors(model: Any) -> dict[str, "torch.Tensor"]:
    tensors = {
        "model.embed_tokens.weight": model.model.embed_tokens.weight,
        "model.norm.weight": model.model.norm.weight,
    }
    if not model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = model.lm_head.weight
    return tensors
