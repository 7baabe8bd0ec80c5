"""Training of the path network: token ids in, logged routes as targets, binary cross-entropy."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from moeflow.predictors.odds import MIN_PROBABILITY, log_odds, multi_hot
from moeflow.predictors.path.net import PathNet, PathShape
from moeflow.predictors.path.predictor import PathPredictor
from moeflow.predictors.routes import Routes
from moeflow.predictors.training import Progress, TrainingOptions, fit, length_batches, stopping_split

_MAX_TOKENS = 128  # of a piece; a multiple of the window


def train_path(
    routes: Routes, options: TrainingOptions | None = None, progress: Progress | None = None, **sizes: int
) -> PathPredictor:
    """Train a routing path predictor.

    Args:
        routes: to learn from; every tenth sequence only decides when to stop.
        options: seed, epochs, device.
        progress: called with the share done, 0 to 1, and a title.
        sizes: other than PathShape's.

    Raises:
        ConfigError: fewer than two sequences, or no such device.
    """
    options = options or TrainingOptions()
    torch.manual_seed(options.seed)
    learned, stopping = (part.cut(_MAX_TOKENS) for part in stopping_split(routes))
    net = PathNet(PathShape(routes.num_layers, routes.num_experts, **sizes)).to(options.torch_device)
    demanded = sum(multi_hot(experts, routes.num_experts).sum(0) for experts in learned.experts)
    popularity = np.clip(demanded / learned.num_tokens, MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    with torch.no_grad():
        net.heads.bias.copy_(torch.from_numpy(log_odds(popularity).astype(np.float32)).flatten())
    lengths = [len(token_ids) for token_ids in learned.token_ids]

    def losses(rng: np.random.Generator) -> Iterator[torch.Tensor]:
        for batch in length_batches(lengths, options.batch_size, rng):
            yield _loss(net, learned, batch)

    @torch.no_grad()
    def stopping_loss() -> float:
        total = sum(
            float(_loss(net, stopping, [s])) * len(stopping.token_ids[s]) for s in range(len(stopping.token_ids))
        )
        return total / stopping.num_tokens

    fit(
        net,
        net.parameters(),
        losses,
        stopping_loss,
        options,
        epochs=options.epochs,
        updates_per_epoch=-(-len(lengths) // options.batch_size),
        progress=progress,
        title="routing path",
    )
    return PathPredictor(net)


def _loss(net: PathNet, routes: Routes, sequences: list[int]) -> torch.Tensor:
    device = net.heads.weight.device

    def pad(arrays: list[np.ndarray]) -> torch.Tensor:
        return pad_sequence([torch.from_numpy(np.ascontiguousarray(array)) for array in arrays], batch_first=True)

    token_ids = pad([routes.token_ids[s].astype(np.int64) for s in sequences]).to(device)
    truth = pad([multi_hot(routes.experts[s], routes.num_experts) for s in sequences]).to(device)
    valid = pad([np.ones(len(routes.token_ids[s]), bool) for s in sequences]).to(device)
    return F.binary_cross_entropy_with_logits(net(token_ids)[valid], truth[valid])
