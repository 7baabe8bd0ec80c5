"""The arithmetic of routed experts in plain torch: the oracle of every faster kernel.

Knows tensors. Knows nothing of caches, files or models.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

# Tokens combined at a time: bounds the float32 copy, and never depends on a memory budget.
_COMBINE_TOKENS = 512


def expert_mlp(
    hidden_states: torch.Tensor,
    weights: dict[str, torch.Tensor],
    *,
    activation: Callable[[torch.Tensor], torch.Tensor],
    is_transposed: bool = False,
) -> torch.Tensor:
    """Run one expert on the tokens routed to it.

    Args:
        hidden_states: [num_tokens, H], the tokens.
        weights: "gate_up_proj" [2I, H] or "up_proj" [I, H], "down_proj" [H, I] ([H, 2I] and [I, H] when transposed),
            and optionally their names with "_bias", [2I] and [H].
        activation: [num_tokens, 2I] -> [num_tokens, I], the gate; or [num_tokens, I] -> the same without one.
        is_transposed: whether matrices are stored [in, out].

    Returns:
        [num_tokens, H], not yet weighted by the router.
    """
    hidden = hidden_activations(hidden_states, weights, activation=activation, is_transposed=is_transposed)
    return _linear(hidden, weights, "down_proj", is_transposed)


def hidden_activations(
    hidden_states: torch.Tensor,
    weights: dict[str, torch.Tensor],
    *,
    activation: Callable[[torch.Tensor], torch.Tensor],
    is_transposed: bool = False,
) -> torch.Tensor:
    """Run an expert up to its second matrix; arguments as in `expert_mlp`. Returns [num_tokens, I]."""
    first = "gate_up_proj" if "gate_up_proj" in weights else "up_proj"
    return activation(_linear(hidden_states, weights, first, is_transposed))


def combine(outputs: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """Sum each token's expert outputs by router weight, in float32 or wider and always in the order of K.

    Args:
        outputs: [num_tokens, K, H].
        top_k_weights: [num_tokens, K].

    Returns:
        [num_tokens, H] in the dtype of `outputs`.
    """
    if outputs.shape[0] <= _COMBINE_TOKENS:
        wide = torch.promote_types(outputs.dtype, torch.float32)
        weighted = outputs.to(wide) * top_k_weights.to(wide).unsqueeze(-1)
        return weighted.sum(dim=1).to(outputs.dtype)
    parts = zip(outputs.split(_COMBINE_TOKENS), top_k_weights.split(_COMBINE_TOKENS), strict=True)
    return torch.cat([combine(part, part_weights) for part, part_weights in parts])


def _linear(hidden_states, weights, name, is_transposed) -> torch.Tensor:
    weight, bias = weights[name], weights.get(f"{name}_bias")
    if not is_transposed:
        return F.linear(hidden_states, weight, bias)
    output = hidden_states @ weight
    return output if bias is None else output + bias
