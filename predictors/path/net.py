"""Routing path network: a small encoder-decoder transformer over token ids with one linear head per MoE layer.

Every position sees itself and a bounded window before it, in each block, so that one token can be added at a time with
the keys and values of the window kept. Source: ExpertFlow, section 3 (d_model 32, d_ff 2048, T5's relative positions).
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

Cache = dict[nn.Module, torch.Tensor]  # each attention's keys and values of the positions in its window


@dataclass(frozen=True)
class PathShape:
    """Sizes of the path network; its embedding is shared by token ids that are equal modulo num_rows.

    Args:
        num_layers: L.
        num_experts: E.
        num_rows: of the embedding.
        width: d_model.
        inner_width: d_ff.
        num_heads: of attention.
        num_blocks: of the encoder, and as many of the decoder.
        window: positions a block looks at.
    """

    num_layers: int
    num_experts: int
    num_rows: int = 32768
    width: int = 32
    inner_width: int = 2048
    num_heads: int = 4
    num_blocks: int = 2
    window: int = 32


class Attention(nn.Module):
    """Attention over a window of positions, with a learned bias a distance."""

    def __init__(self, shape: PathShape) -> None:
        super().__init__()
        self.shape = shape
        self.query = nn.Linear(shape.width, shape.width, bias=False)
        self.key_value = nn.Linear(shape.width, 2 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.distance = nn.Parameter(torch.zeros(shape.num_heads, shape.window))

    def forward(self, hidden: torch.Tensor, source: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """Attend from hidden [B, T, C] to source [B, T, C] and to the earlier positions in the cache."""
        shape = self.shape
        keys_values = self.key_value(source)
        if cache is not None:
            if self in cache:
                keys_values = torch.cat([cache[self], keys_values], 1)
            cache[self] = keys_values[:, 1 - shape.window :]
        num_queries, num_keys = hidden.shape[1], keys_values.shape[1]

        def split(x: torch.Tensor) -> torch.Tensor:
            return x.view(*x.shape[:2], shape.num_heads, -1).transpose(1, 2)

        keys, values = (split(x) for x in keys_values.chunk(2, -1))
        at = torch.arange(num_keys - num_queries, num_keys, device=hidden.device)[:, None]
        distance = at - torch.arange(num_keys, device=hidden.device)
        bias = self.distance[:, distance.clamp(0, shape.window - 1)]
        bias = bias.masked_fill((distance < 0) | (distance >= shape.window), float("-inf"))
        attended = F.scaled_dot_product_attention(split(self.query(hidden)), keys, values, attn_mask=bias)
        return self.out(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, attention to the encoder in a decoder's block, and a feed-forward layer."""

    def __init__(self, shape: PathShape, decoder: bool) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.cross = Attention(shape) if decoder else None
        self.norms = nn.ModuleList(nn.RMSNorm(shape.width) for _ in range(3 if decoder else 2))
        self.inner = nn.Linear(shape.width, shape.inner_width, bias=False)
        self.outer = nn.Linear(shape.inner_width, shape.width, bias=False)

    def forward(self, hidden: torch.Tensor, encoded: torch.Tensor | None, cache: Cache | None) -> torch.Tensor:
        normed = self.norms[0](hidden)
        hidden = hidden + self.attention(normed, normed, cache)
        if self.cross is not None:
            hidden = hidden + self.cross(self.norms[1](hidden), encoded, cache)
        return hidden + self.outer(torch.relu(self.inner(self.norms[-1](hidden))))


class PathNet(nn.Module):
    """Predicts all layers' experts of each position from the token ids up to it.

    Args:
        shape: sizes.
    """

    def __init__(self, shape: PathShape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.num_rows, shape.width)
        self.encoder = nn.ModuleList(Block(shape, decoder=False) for _ in range(shape.num_blocks))
        self.decoder = nn.ModuleList(Block(shape, decoder=True) for _ in range(shape.num_blocks))
        self.encoder_norm, self.decoder_norm = nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)
        self.heads = nn.Linear(shape.width, shape.num_layers * shape.num_experts)  # one a layer, side by side

    def forward(self, token_ids: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Predict token_ids [B, T]: logits [B, T, L, E]; `cache` is kept from call to call of one sequence."""
        embedded = encoded = self.embedding(token_ids % self.shape.num_rows)
        for block in self.encoder:
            encoded = block(encoded, None, cache)
        hidden, encoded = embedded, self.encoder_norm(encoded)
        for block in self.decoder:
            hidden = block(hidden, encoded, cache)
        logits = self.heads(self.decoder_norm(hidden))
        return logits.view(*token_ids.shape, self.shape.num_layers, self.shape.num_experts)
