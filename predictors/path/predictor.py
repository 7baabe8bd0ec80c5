"""Routing path predictor, live: all layers of a step from token ids alone, before its first MoE layer runs.

Prompts go through the torch network; a step is the same arithmetic in numpy, for one token and the keys and values of
the window before it, because a hundred small torch operations would take longer than their arithmetic.
"""

from typing import cast

import numpy as np
import torch

from moeflow.predictors.odds import sigmoid
from moeflow.predictors.path.net import Attention, Block, Cache, PathNet, PathShape

_EPS = np.finfo(np.float32).eps  # of nn.RMSNorm


class PathPredictor:
    """Predicts by a PathNet; it never looks at routes.

    Args:
        net: trained.
    """

    name = "path"
    signal = "none"
    reach = 0

    def __init__(self, net: PathNet) -> None:
        self.net = net.cpu().eval().requires_grad_(False)
        self.num_layers, self.num_experts = net.shape.num_layers, net.shape.num_experts
        self._embedding, self._heads = net.embedding.weight.numpy(), _linear(net.heads)
        self._heads_bias = net.heads.bias.numpy()
        self._encoder = [_Block(cast(Block, block), net.shape) for block in net.encoder]
        self._decoder = [_Block(cast(Block, block), net.shape) for block in net.decoder]
        self._norms = net.encoder_norm.weight.numpy(), net.decoder_norm.weight.numpy()
        self.begin(1)

    def begin(self, num_sequences: int) -> None:
        for block in (*self._encoder, *self._decoder):
            for attention in block.attentions:
                attention.begin(num_sequences)
        self._fed = np.zeros(num_sequences, np.int64)

    @torch.inference_mode()
    def prefill(self, token_ids: np.ndarray, experts: np.ndarray, weights: np.ndarray | None) -> None:
        valid = experts[:, :, 0, 0] < self.num_experts
        for b, fed in enumerate(ids[mask] for ids, mask in zip(token_ids, valid, strict=True)):
            cache: Cache = {}
            if len(fed):
                self.net(torch.from_numpy(fed.astype(np.int64))[None], cache)
            for block in (*self._encoder, *self._decoder):
                for attention in block.attentions:
                    attention.fill(b, cache)
            self._fed[b] = len(fed)

    def step(self, token_ids: np.ndarray) -> np.ndarray:
        self._fed += 1
        window = self.net.shape.window
        absent = np.arange(window)[::-1] >= self._fed[:, None]  # [B, window], before the sequence's start
        masked = np.where(absent, np.float32(-np.inf), np.float32(0))[:, None]
        embedded = encoded = self._embedding[token_ids % self.net.shape.num_rows]
        for block in self._encoder:
            encoded = block.feed(encoded, None, masked)
        hidden, encoded = embedded, _norm(encoded, self._norms[0])
        for block in self._decoder:
            hidden = block.feed(hidden, encoded, masked)
        logits = _norm(hidden, self._norms[1]) @ self._heads + self._heads_bias
        return sigmoid(logits).reshape(-1, self.num_layers, self.num_experts)

    def observe(
        self, layer: int, experts: np.ndarray, weights: np.ndarray | None, signal: np.ndarray | None = None
    ) -> None:
        return None

    def later(self) -> None:
        return None


class _Attention:
    """One attention with the keys and values of its window, the newest last."""

    def __init__(self, attention: Attention, shape: PathShape) -> None:
        self._source, self._shape = attention, shape
        self._query, self._key_value, self._out = map(_linear, (attention.query, attention.key_value, attention.out))
        self._query = self._query / np.sqrt(shape.width // shape.num_heads, dtype=np.float32)
        self._bias = np.ascontiguousarray(attention.distance.numpy()[:, ::-1])

    def begin(self, num_sequences: int) -> None:
        head_width = self._shape.width // self._shape.num_heads
        self._kept = np.zeros((2, num_sequences, self._shape.num_heads, self._shape.window, head_width), np.float32)

    def fill(self, sequence: int, cache: Cache) -> None:
        """Take over the network's keys and values of a prompt; none where it was empty."""
        self._kept[:, sequence] = 0
        if self._source in cache:
            kept = cache[self._source][0].numpy()  # [n, 2 * width]
            heads = kept.reshape(len(kept), 2, self._shape.num_heads, -1).transpose(1, 2, 0, 3)
            self._kept[:, sequence, :, self._shape.window - len(kept) :] = heads

    def feed(self, hidden: np.ndarray, source: np.ndarray, masked: np.ndarray) -> np.ndarray:
        """Attend from hidden [B, C] to source [B, C] and to the tokens fed before."""
        kept, shape = self._kept, (len(hidden), self._shape.num_heads, 1, -1)
        kept[..., :-1, :] = kept[..., 1:, :]
        kept[..., -1, :] = (source @ self._key_value).reshape(len(hidden), 2, *kept.shape[2:3], -1).swapaxes(0, 1)
        queries = (hidden @ self._query).reshape(shape)
        scores = (queries @ kept[0].swapaxes(2, 3))[:, :, 0] + self._bias + masked
        weights = np.exp(scores - scores.max(2, keepdims=True))
        weights /= weights.sum(2, keepdims=True)
        return (weights[:, :, None] @ kept[1]).reshape(len(hidden), -1) @ self._out


class _Block:
    """One block of the encoder or decoder."""

    def __init__(self, block: Block, shape: PathShape) -> None:
        self.attentions = [_Attention(one, shape) for one in (block.attention, block.cross) if one is not None]
        self._norms = [cast(torch.nn.RMSNorm, norm).weight.numpy() for norm in block.norms]
        self._inner, self._outer = _linear(block.inner), _linear(block.outer)

    def feed(self, hidden: np.ndarray, encoded: np.ndarray | None, masked: np.ndarray) -> np.ndarray:
        """Add one token: hidden [B, C]; encoded [B, C] in a decoder."""
        normed = _norm(hidden, self._norms[0])
        hidden = hidden + self.attentions[0].feed(normed, normed, masked)
        if encoded is not None:
            hidden = hidden + self.attentions[1].feed(_norm(hidden, self._norms[1]), encoded, masked)
        return hidden + np.maximum(_norm(hidden, self._norms[-1]) @ self._inner, 0) @ self._outer


def _linear(module: torch.nn.Linear) -> np.ndarray:
    return module.weight.numpy().T


def _norm(hidden: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return hidden / np.sqrt(np.mean(hidden * hidden, 1, keepdims=True) + _EPS) * weight
