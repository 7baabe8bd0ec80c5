"""Hidden states of calibration texts on their way through a dense Llama, layer by layer.

Knows attention and padding. Knows nothing of experts.
"""

from collections.abc import Iterator
from typing import Any

import torch


class Stream:
    """Hidden states of all calibration texts at one depth of the model, after the layers converted so far.

    Texts of similar length share a padded batch. Padding stands to the right, so causal attention never sees it
    and no mask is needed; `flat` and `padded` move between batches and the [T, H] rows of real tokens.

    Args:
        model: the dense causal language model.
        texts: token ids of each text.
        batch_tokens: tokens of a batch, padding included.
    """

    def __init__(self, model: Any, texts: list[list[int]], batch_tokens: int = 8192) -> None:
        batches = list(_padded_batches(texts, batch_tokens))
        self.model = model.model
        self.layer = 0
        self.masks = [mask for _, mask in batches]
        self.hidden_states = [self.model.embed_tokens(ids).float() for ids, _ in batches]

    def attend(self) -> Any:
        """Run the next layer's attention; return that layer."""
        layer = self.model.layers[self.layer]
        for i, hidden_states in enumerate(self.hidden_states):
            self.hidden_states[i] = hidden_states + _attention(self.model, layer, hidden_states)
        return layer

    def add(self, output: torch.Tensor) -> None:
        """Add a feed-forward's output, [T, H], and move on to the next layer."""
        self.hidden_states = [a + b for a, b in zip(self.hidden_states, self.padded(output), strict=True)]
        self.layer += 1

    def flat(self) -> torch.Tensor:
        """Return the rows of real tokens: [T, H]."""
        return torch.cat([hidden[mask] for hidden, mask in zip(self.hidden_states, self.masks, strict=True)])

    def padded(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return [T, H] rows as padded batches; padding is zero."""
        batches, start = [], 0
        for mask in self.masks:
            end = start + int(mask.sum())
            batch = rows.new_zeros(*mask.shape, rows.shape[1])
            batch[mask] = rows[start:end]
            batches.append(batch)
            start = end
        return batches


def _attention(model: Any, layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(hidden_states.shape[1])[None]
    rotary = model.rotary_emb(hidden_states, positions)
    normed = layer.input_layernorm(hidden_states)
    return layer.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0]


def _padded_batches(texts: list[list[int]], batch_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids [B, L], mask [B, L] of real tokens) with B * L near `batch_tokens`."""
    texts = sorted(texts, key=len)
    while texts:
        longest = len(texts[-1])
        size = max(1, batch_tokens // longest)
        batch, texts = texts[-size:], texts[:-size]
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in batch])
        mask = torch.tensor([[True] * len(text) + [False] * (longest - len(text)) for text in batch])
        yield ids, mask
