"""Sizes and constants of the demo model, and the weights that one converted layer has.

Knows numbers. Knows nothing of how layers are converted; imports no torch, since the command line shows the costs of a
build before anything heavy is loaded.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Recipe:
    """The numbers that decide the converted model; two builds with equal recipes are equal.

    Args:
        num_experts: experts of one layer.
        num_experts_per_tok: experts a token is sent to.
        expert_size: neurons an expert keeps of the dense feed-forward.
        kmeans_rounds: rounds of k-means over the feed-forward inputs.
        router_scale: router logit of a token that sits exactly on a centroid.
        router_ridge: ridge of the router, as a share of the mean squared input.
        ridge: ridge of the down projections towards the dense columns, as a share of the mean squared activation.
        sweeps: rounds in which experts are refitted to what the other expert of each token leaves over.
        num_prompts: texts the dense model writes for calibration.
        num_new_tokens: tokens it writes after each prompt.
        num_library_tokens: tokens of standard library text.
        seed: seed of prompts, sampling and k-means.
    """

    num_experts: int = 16
    num_experts_per_tok: int = 2
    expert_size: int = 768
    kmeans_rounds: int = 15
    router_scale: float = 12.0
    router_ridge: float = 1e-3
    ridge: float = 0.4
    sweeps: int = 2
    num_prompts: int = 144
    num_new_tokens: int = 224
    num_library_tokens: int = 12_000
    seed: int = 0


class SplitFfn(NamedTuple):
    """One layer's experts, in bfloat16.

    Args:
        router: [E, H], rows score a feed-forward input for each expert.
        neurons: [E, M], which dense neurons each expert keeps, ascending.
        down_proj: [E, M, H], refitted columns of the dense down projection, transposed.
    """

    router: "torch.Tensor"
    neurons: "torch.Tensor"
    down_proj: "torch.Tensor"
