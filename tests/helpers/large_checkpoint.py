"""A checkpoint of 671B parameters made of sparse files."""

import json
import struct

LARGE_CONFIG = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "n_routed_experts": 256, "num_experts_per_tok": 8,
    "hidden_size": 7168, "vocab_size": 129280, "torch_dtype": "bfloat16", "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "num_attention_heads": 128, "max_position_embeddings": 163840,
}  # fmt: skip


def write_large_checkpoint(folder, *, num_layers=61, num_experts=256, hidden=7168, intermediate=2048, num_shards=163):
    """Write a sparse checkpoint with DeepSeek-V3's experts: real headers, no data on disk."""
    tensors = []
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        tensors += [(f"{prefix}.self_attn.{n}_proj.weight", (hidden, hidden)) for n in "qkvo"]
        if layer >= 3:
            for expert in range(num_experts):
                path = f"{prefix}.mlp.experts.{expert}"
                tensors += [
                    (f"{path}.gate_proj.weight", (intermediate, hidden)),
                    (f"{path}.up_proj.weight", (intermediate, hidden)),
                    (f"{path}.down_proj.weight", (hidden, intermediate)),
                ]
    weight_map = {}
    per_shard = -(-len(tensors) // num_shards)
    for shard in range(num_shards):
        name, header, position = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors", {}, 0
        for tensor, shape in tensors[shard * per_shard : (shard + 1) * per_shard]:
            size = 2 * shape[0] * shape[1]
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
            weight_map[tensor] = name
            position += size
        text = json.dumps(header).encode()
        with open(folder / name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + position)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return len(tensors)
