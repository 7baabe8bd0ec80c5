"""How a dense Llama becomes a mixture of experts without training: the arithmetic of one layer after the other.

Knows nothing about downloads, files or progress: a dense model and token ids go in, a layer's weights come out.
`import torch` is left to the functions, because the command line reads this module for its help text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Recipe:
    """The numbers that decide what the converted model is; two builds with equal recipes are equal.

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

    router: "torch.Tensor"  # noqa: F821
    neurons: "torch.Tensor"  # noqa: F821
    down_proj: "torch.Tensor"  # noqa: F821


class Stream:
    """Hidden states of all calibration texts at one depth of the model, after the layers converted so far.

    Texts of similar length share a padded batch. Padding stands to the right, so causal attention never sees it
    and no mask is needed; `flat` and `padded` move between batches and the [T, H] rows of real tokens.
    """

    def __init__(self, model, texts: list[list[int]], batch_tokens: int = 8192):
        batches = list(_padded_batches(texts, batch_tokens))
        self.model = model.model
        self.layer = 0
        self.masks = [mask for _, mask in batches]
        self.hidden_states = [self.model.embed_tokens(ids).float() for ids, _ in batches]

    def attend(self):
        """Run the next layer's attention; return that layer."""
        layer = self.model.layers[self.layer]
        for i, hidden_states in enumerate(self.hidden_states):
            self.hidden_states[i] = hidden_states + _attention(self.model, layer, hidden_states)
        return layer

    def add(self, output) -> None:
        """Add a feed-forward's output, [T, H], and move on to the next layer."""
        self.hidden_states = [a + b for a, b in zip(self.hidden_states, self.padded(output), strict=True)]
        self.layer += 1

    def flat(self):
        """Return the rows of real tokens: [T, H]."""
        import torch

        return torch.cat([hidden[mask] for hidden, mask in zip(self.hidden_states, self.masks, strict=True)])

    def padded(self, rows) -> list:
        """Return [T, H] rows as padded batches; padding is zero."""
        batches, start = [], 0
        for mask in self.masks:
            end = start + int(mask.sum())
            batch = rows.new_zeros(*mask.shape, rows.shape[1])
            batch[mask] = rows[start:end]
            batches.append(batch)
            start = end
        return batches


def split_layer(stream: Stream, recipe: Recipe) -> SplitFfn:
    """Turn the stream's next feed-forward into experts, and move the stream past it.

    Args:
        stream: calibration texts, standing before the layer to convert.
        recipe: sizes and constants.

    Source: clustering tokens and keeping each cluster's neurons follows MoEfication (Zhang et al. 2022, section 3);
    refitting the kept weights by least squares is the idea of SparseGPT (Frantar and Alistarh 2023, section 3).
    """
    from moeflow.hf.experts_interface import gated_hidden

    layer = stream.attend()
    residual = stream.flat()
    inputs = layer.post_attention_layernorm(residual)
    activations = gated_hidden(layer.mlp, inputs)
    down_columns = layer.mlp.down_proj.weight.T
    targets = activations @ down_columns
    # A token's error matters as much as the next norm leaves of it: sink tokens are a thousand times longer.
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
    from moeflow.hf.experts_interface import gated_hidden

    layer = stream.attend()
    inputs = layer.post_attention_layernorm(stream.flat())
    stream.add(_split_output(inputs, gated_hidden(layer.mlp, inputs), split, recipe))


def fit_experts(inputs, activations, targets, token_weight, down_columns, recipe: Recipe, seed: int) -> SplitFfn:
    """Fit router, neuron choice and down projections of one layer.

    Args:
        inputs: [T, H], feed-forward inputs.
        activations: [T, I], the dense neurons on those inputs.
        targets: [T, H], what the experts of a token should add up to.
        token_weight: [T], weight of each token's error.
        down_columns: [I, H], the dense down projection, transposed.
        recipe: sizes and constants.
        seed: seed of k-means.
    """
    import torch

    router = fit_router(inputs, recipe, seed)
    top_k_index, top_k_weights = route(inputs, router, recipe.num_experts_per_tok)
    column_energy = down_columns.square().sum(1)
    missing = targets * token_weight[:, None]  # what the experts do not give yet: [T, H]
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
    """One expert's ridge regression, factored once: features [t, M] times down_proj [M, H] is what it gives."""

    def __init__(self, token, neurons, features, dense_columns, ridge: float):
        import torch

        self.token, self.neurons, self.features = token, neurons, features
        self.dense_columns = self.down_proj = dense_columns
        gram = features.T @ features
        # The floor keeps an expert that no calibration token reaches at the dense columns.
        self.ridge = ridge * gram.diagonal().mean().clamp(min=1e-6)
        gram.diagonal().add_(self.ridge)
        self.factor = torch.linalg.cholesky(gram)

    def refit(self, missing):
        """Move down_proj to the best answer to what is missing, [t, H], and return the change, [M, H]."""
        import torch

        pull = self.ridge * (self.dense_columns - self.down_proj)
        change = torch.cholesky_solve(self.features.T @ missing + pull, self.factor)
        self.down_proj = self.down_proj + change
        return change


def fit_router(inputs, recipe: Recipe, seed: int):
    """Return router rows [E, H] whose logits follow `router_scale * cosine` to k-means centroids of the inputs.

    Args:
        inputs: [T, H], feed-forward inputs.
        recipe: sizes and constants.
        seed: seed of the first centroids.
    """
    import torch

    directions = torch.nn.functional.normalize(inputs - inputs.mean(0), dim=1)
    centroids = spherical_kmeans(directions, recipe.num_experts, recipe.kmeans_rounds, seed)
    gram = inputs.T @ inputs
    gram.diagonal().add_(recipe.router_ridge * gram.diagonal().mean())
    logits = recipe.router_scale * (directions @ centroids.T)
    return torch.linalg.solve(gram, inputs.T @ logits).T.contiguous().bfloat16()


def spherical_kmeans(directions, num_centroids: int, num_rounds: int, seed: int):
    """Return unit centroids [E, H] of unit vectors, started far apart.

    Args:
        directions: [T, H], unit vectors.
        num_centroids: E.
        num_rounds: rounds of assignment and averaging.
        seed: seed of the first centroids.

    Source: k-means++ (Arthur and Vassilvitskii 2007, section 2.2), with the cosine as closeness.
    """
    import torch

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


def route(inputs, router, top_k: int):
    """Return top_k_index and top_k_weights, each [T, K], as Mixtral's router does.

    Args:
        inputs: [T, H], feed-forward inputs.
        router: [E, H].
        top_k: experts a token is sent to.
    """
    weights, index = (inputs @ router.T.to(inputs.dtype)).softmax(-1).topk(top_k)
    return index, weights / weights.sum(-1, keepdim=True)


def _split_output(inputs, activations, split: SplitFfn, recipe: Recipe):
    """Return what the stored experts give: [T, H]."""
    import torch

    top_k_index, top_k_weights = route(inputs, split.router, recipe.num_experts_per_tok)
    output = torch.zeros_like(inputs)
    for expert in range(recipe.num_experts):
        token, rank = (top_k_index == expert).nonzero(as_tuple=True)
        part = activations[token][:, split.neurons[expert]] @ split.down_proj[expert].float()
        output.index_add_(0, token, part * top_k_weights[token, rank][:, None])
    return output


def _attention(model, layer, hidden_states):
    import torch

    positions = torch.arange(hidden_states.shape[1])[None]
    rotary = model.rotary_emb(hidden_states, positions)
    normed = layer.input_layernorm(hidden_states)
    return layer.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0]


def _padded_batches(texts: list[list[int]], batch_tokens: int) -> Iterator[tuple]:
    """Yield (ids [B, L], mask [B, L] of real tokens) with B * L near `batch_tokens`."""
    import torch

    texts = sorted(texts, key=len)
    while texts:
        longest = len(texts[-1])
        size = max(1, batch_tokens // longest)
        batch, texts = texts[-size:], texts[:-size]
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in batch])
        mask = torch.tensor([[True] * len(text) + [False] * (longest - len(text)) for text in batch])
        yield ids, mask
