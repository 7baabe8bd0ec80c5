"""What llama.cpp's converter does to the projections of latent attention. Knows shapes, and nothing of names."""

from typing import Any

import torch


class LatentHeads:
    """The projection from the latent to keys and values: in the file apart, and the keys transposed in each head.

    The parameter [heads * (key + value), rank] has each head's rows of keys (without positions), then of values. The
    file has keys [heads, rank, key] and values [heads, value, rank].
    """

    moves_rows = False

    def read(self, tensors: list[torch.Tensor], config: Any) -> torch.Tensor:
        keys, values = tensors
        heads, rank = config.num_attention_heads, config.kv_lora_rank
        keys = keys.reshape(heads, rank, config.qk_nope_head_dim).transpose(1, 2)
        values = values.reshape(heads, config.v_head_dim, rank)
        return torch.cat([keys, values], dim=1).reshape(-1, rank)

    def write(self, parameter: torch.Tensor, config: Any) -> list[torch.Tensor]:
        heads = parameter.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        keys, values = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        return [keys.transpose(1, 2).contiguous(), values.contiguous()]
