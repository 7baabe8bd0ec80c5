"""Thresholds of online pruning for every layer, from one pass over calibration text.

Knows hooks of a model. Knows nothing of how thresholds are applied.
"""

import torch

from moeflow.hf import experts_interface
from moeflow.kernels.pruning import PruningThreshold, find_threshold


@torch.no_grad()
def calibrate_pruning(
    model: torch.nn.Module,
    windows: list[list[int]],
    *,
    skipped_share: float = 0.5,
    protected_share: float = 0.02,
) -> list[PruningThreshold]:
    """Run a model over text and find each layer's thresholds.

    Args:
        model: from load_moe or from_pretrained.
        windows: token ids of pieces of text, all of one length; they go through as one batch.
        skipped_share: 0 to 1, share of the ranks behind a token's first that will be skipped.
        protected_share: 0 to 1, share of the tokens that will keep all their experts.

    Returns:
        One threshold a MoE layer.

    Raises:
        ConfigError: a share is outside 0 to 1.
    """
    found: list[PruningThreshold] = []

    def watch(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        hidden_states, _, weights = experts_interface.experts_arguments(args, kwargs)
        shares = {"skipped_share": skipped_share, "protected_share": protected_share}
        found.append(find_threshold(hidden_states, weights, **shares))

    handles = [
        module.register_forward_pre_hook(watch, with_kwargs=True)
        for _, module in experts_interface.experts_modules(model)
    ]
    try:
        rows = torch.tensor(windows, device=next(model.parameters()).device)
        model(input_ids=rows, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return found
