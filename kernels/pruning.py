"""Online pruning: a token skips the experts of low router weight. Lossy.

A token skips rank k where its weight over the token's largest is under the layer's threshold; the kept weights are
scaled up to the sum of all ranks. An important token keeps all its experts. MC-MoE measures importance by |t|_1 times
the attention a token receives. The experts' function does not see attention, so here it is the norm alone, of the
hidden states as the experts receive them: behind the layer's norm, not the residual stream.

Knows tensors. Knows nothing of models.

Source: online dynamic pruning in MC-MoE (arXiv 2410.06270, section 3.3), there for two experts a token.
"""

from typing import NamedTuple

import torch

from moeflow.errors import ConfigError


class PruningThreshold(NamedTuple):
    """The thresholds by which one layer skips experts.

    Args:
        ratio: a rank whose weight over the token's largest is under this is skipped, 0 to 1.
        norm: a token whose |t|_1 is this or more keeps all its experts; infinity protects none.
    """

    ratio: float
    norm: float = float("inf")

    def apply(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, *, num_experts: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Skip experts by this layer's thresholds; see `prune`."""
        protected = None if self.norm == float("inf") else protected_tokens(hidden_states, self.norm)
        return prune(top_k_index, top_k_weights, self.ratio, protected, num_experts=num_experts)


def prune(
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    threshold: float,
    protected: torch.Tensor | None = None,
    *,
    num_experts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Skip the experts of low weight.

    Args:
        top_k_index: [T, K], expert numbers; a number of num_experts or more means none.
        top_k_weights: [T, K], >= 0.
        threshold: 0 to 1, least share of the token's largest weight that is kept.
        protected: [T] bool, tokens that keep all; None protects none.
        num_experts: the number that stands for none.

    Returns:
        [T, K] numbers, num_experts where skipped, and [T, K] weights, 0 there; each token's sum is unchanged.

    Raises:
        ConfigError: the threshold is not between 0 and 1.
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(f"a pruning threshold of {threshold} is not a share. Give 0 (skip nothing) to 1.")
    absent = top_k_index >= num_experts
    weights = top_k_weights.masked_fill(absent, 0)
    skipped = weights < threshold * weights.amax(-1, keepdim=True)
    if protected is not None:
        skipped &= ~protected[:, None]
    kept = weights.masked_fill(skipped, 0)
    scale = weights.float().sum(-1, keepdim=True) / kept.float().sum(-1, keepdim=True)
    scaled = torch.where(skipped.any(-1, keepdim=True), kept.float() * scale, kept.float()).to(top_k_weights.dtype)
    return top_k_index.masked_fill(skipped | absent, num_experts), scaled


def protected_tokens(hidden_states: torch.Tensor, norm: float) -> torch.Tensor:
    """Return [T] bool: which of the tokens [T, H] have |t|_1 >= norm."""
    return hidden_states.float().abs().sum(-1) >= norm


def find_threshold(
    hidden_states: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    skipped_share: float = 0.5,
    protected_share: float = 0.02,
) -> PruningThreshold:
    """Find one layer's thresholds from calibration tokens.

    Args:
        hidden_states: [T, H], as the experts receive them.
        top_k_weights: [T, K].
        skipped_share: 0 to 1, share of the ranks behind a token's first that are skipped; .5 is the median.
        protected_share: 0 to 1, share of the tokens that keep all their experts.

    Raises:
        ConfigError: a share is outside 0 to 1, or there are no tokens.
    """
    for name, share in (("skipped_share", skipped_share), ("protected_share", protected_share)):
        if not 0 <= share <= 1:
            raise ConfigError(f"{name}={share} is not a share. Give 0 to 1.")
    if not len(hidden_states):
        raise ConfigError("pruning is calibrated on tokens, and there are none. Give a longer text.")
    ranked = top_k_weights.float().sort(dim=-1, descending=True).values
    ratios = (ranked[:, 1:] / ranked[:, :1].clamp(min=torch.finfo(torch.float32).tiny)).flatten()
    ratio = _quantile(ratios, skipped_share) if skipped_share and len(ratios) else 0.0
    norms = hidden_states.float().abs().sum(-1)
    return PruningThreshold(ratio, _quantile(norms, 1 - protected_share) if protected_share else float("inf"))


def _quantile(values, share) -> float:
    # torch.quantile takes no more than 16 million values
    return values.kthvalue(min(max(round(share * len(values)), 1), len(values))).values.item()
