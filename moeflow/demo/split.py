"""Turns the feed-forward of a dense Llama into experts without training, one layer after the other.

Knows tensors: a stream of calibration texts goes in, a layer's weights come out. Knows nothing of downloads, files or
progress.
"""

import torch

from moeflow.demo.recipe import Recipe, SplitFfn
from moeflow.demo.stream import Stream
from moeflow.hf.experts_interface import gated_hidden


def split_layer(stream: Stream, recipe: Recipe) -> SplitFfn:
    """Turn the stream's next feed-forward into experts, and move the stream past it.

    Args:
        stream: calibration texts, standing before the layer to convert.
        recipe: sizes and constants.

    Source: clustering tokens and keeping each cluster's neurons follows MoEfication (Zhang et al. 2022, section 3);
    refitting the kept weights by least squares is the idea of SparseGPT (Frantar and Alistarh 2023, section 3).
    """
    layer = stream.attend()
    residual = stream.flat()
    inputs = layer.post_attention_layernorm(residual)
    activations = gated_hidden(layer.mlp, inputs)
    down_columns = layer.mlp.down_proj.weight.T
    targets = activations @ down_columns
    # The next norm divides a token's error by its length: sink tokens are a thousand times longer.
    token_weight = 1 / (residual + targets).norm(dim=1)
    token_weight /= token_weight.mean()
    split = fit_experts(inputs, activations, targets, token_weight, down_columns, recipe, recipe.seed + stream.layer)
    stream.add(_split_output(inputs, activations, split, recipe))
    return split


def replay_layer(stream: Stream, split: SplitFfn, recipe: Recipe) -> None:
    """Move the stream past a layer that was converted before, exactly as `split_layer` did.

    Args:
        stream: calibration texts, standing before that layer.
        split: the layer's experts.
        recipe: sizes and constants.
    """
    layer = stream.attend()
    inputs = layer.post_attention_layernorm(stream.flat())
    stream.add(_split_output(inputs, gated_hidden(layer.mlp, inputs), split, recipe))


def fit_experts(
    inputs: torch.Tensor,
    activations: torch.Tensor,
    targets: torch.Tensor,
    token_weight: torch.Tensor,
    down_columns: torch.Tensor,
    recipe: Recipe,
    seed: int,
) -> SplitFfn:
    """Fit router, neuron choice and down projections of one layer.

    Args:
        inputs: [T, H], feed-forward inputs.
        activations: [T, I], the dense neurons on those inputs.
        targets: [T, H], to which the experts of a token should add up.
        token_weight: [T], weight of each token's error.
        down_columns: [I, H], the dense down projection, transposed.
        recipe: sizes and constants.
        seed: seed of k-means.
    """
    router = fit_router(inputs, recipe, seed)
    top_k_index, top_k_weights = route(inputs, router, recipe.num_experts_per_tok)
    column_energy = down_columns.square().sum(1)
    missing = targets * token_weight[:, None]  # of the experts' sum so far: [T, H]
    parts = []
    for expert in range(recipe.num_experts):
        token, rank = (top_k_index == expert).nonzero(as_tuple=True)
        weighted = activations[token] * (top_k_weights[token, rank] * token_weight[token])[:, None]  # [t, I]
        neurons = (weighted.square().sum(0) * column_energy).topk(recipe.expert_size).indices.sort().values
        part = _Part(token, neurons, weighted.index_select(1, neurons), down_columns[neurons], recipe.ridge)
        missing[token] -= part.features @ part.down_proj
        parts.append(part)
    for _ in range(recipe.sweeps):
        for part in parts:
            missing[part.token] -= part.features @ part.refit(missing[part.token])
    return SplitFfn(
        router, torch.stack([p.neurons for p in parts]), torch.stack([p.down_proj for p in parts]).bfloat16()
    )


class _Part:
    """One expert's ridge regression, factored once: its output is features [t, M] times down_proj [M, H]."""

    def __init__(
        self,
        token: torch.Tensor,
        neurons: torch.Tensor,
        features: torch.Tensor,
        dense_columns: torch.Tensor,
        ridge: float,
    ) -> None:
        self.token, self.neurons, self.features = token, neurons, features
        self.dense_columns = self.down_proj = dense_columns
        gram = features.T @ features
        # The floor keeps an expert that no calibration token reaches at the dense columns.
        self.ridge = ridge * gram.diagonal().mean().clamp(min=1e-6)
        gram.diagonal().add_(self.ridge)
        self.factor = torch.linalg.cholesky(gram)

    def refit(self, missing: torch.Tensor) -> torch.Tensor:
        """Fit down_proj to the missing outputs [t, H], and return the change [M, H]."""
        pull = self.ridge * (self.dense_columns - self.down_proj)
        change = torch.cholesky_solve(self.features.T @ missing + pull, self.factor)
        self.down_proj = self.down_proj + change
        return change


def fit_router(inputs: torch.Tensor, recipe: Recipe, seed: int) -> torch.Tensor:
    """Return router rows [E, H] whose logits follow `router_scale * cosine` to k-means centroids of the inputs.

    Args:
        inputs: [T, H], feed-forward inputs.
        recipe: sizes and constants.
        seed: seed of the first centroids.
    """
    directions = torch.nn.functional.normalize(inputs - inputs.mean(0), dim=1)
    centroids = spherical_kmeans(directions, recipe.num_experts, recipe.kmeans_rounds, seed)
    gram = inputs.T @ inputs
    gram.diagonal().add_(recipe.router_ridge * gram.diagonal().mean())
    logits = recipe.router_scale * (directions @ centroids.T)
    return torch.linalg.solve(gram, inputs.T @ logits).T.contiguous().bfloat16()


def spherical_kmeans(directions: torch.Tensor, num_centroids: int, num_rounds: int, seed: int) -> torch.Tensor:
    """Return unit centroids [E, H] of unit vectors, started far apart.

    Args:
        directions: [T, H], unit vectors.
        num_centroids: E.
        num_rounds: rounds of assignment and averaging.
        seed: seed of the first centroids.

    Source: k-means++ (Arthur and Vassilvitskii 2007, section 2.2), with the cosine as closeness.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(directions), (1,), generator=generator)
    centroids = directions[first]
    distance = (1 - directions @ centroids[0]).clamp(min=1e-9)
    while len(centroids) < num_centroids:
        chosen = directions[torch.multinomial(distance, 1, generator=generator)]
        centroids = torch.cat([centroids, chosen])
        distance = torch.minimum(distance, (1 - directions @ chosen[0]).clamp(min=1e-9))
    for _ in range(num_rounds):
        nearest = (directions @ centroids.T).argmax(1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, directions)
        lonely = torch.bincount(nearest, minlength=num_centroids) == 0
        sums[lonely] = centroids[lonely]
        centroids = torch.nn.functional.normalize(sums, dim=1)
    return centroids


def route(inputs: torch.Tensor, router: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return top_k_index and top_k_weights, each [T, K], as Mixtral's router does.

    Args:
        inputs: [T, H], feed-forward inputs.
        router: [E, H].
        top_k: experts a token is sent to.
    """
    weights, index = (inputs @ router.T.to(inputs.dtype)).softmax(-1).topk(top_k)
    return index, weights / weights.sum(-1, keepdim=True)


def _split_output(inputs: torch.Tensor, activations: torch.Tensor, split: SplitFfn, recipe: Recipe) -> torch.Tensor:
    """Return the output of the stored experts: [T, H]."""
    top_k_index, top_k_weights = route(inputs, split.router, recipe.num_experts_per_tok)
    output = torch.zeros_like(inputs)
    for expert in range(recipe.num_experts):
        token, rank = (top_k_index == expert).nonzero(as_tuple=True)
        part = activations[token][:, split.neurons[expert]] @ split.down_proj[expert].float()
        output.index_add_(0, token, part * top_k_weights[token, rank][:, None])
    return output
