"""Training of the sequence model: the recurrent network and its evidence first, then refinement and rollout."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional as F

from moeflow.predictors.routes import Routes
from moeflow.predictors.sequence.inputs import SequenceInputs, pad_inputs, sequence_inputs
from moeflow.predictors.sequence.net import SequenceNet, SequenceShape
from moeflow.predictors.sequence.predictor import SequencePredictor
from moeflow.predictors.sequence.token_table import TokenTable
from moeflow.predictors.training import Progress, TrainingOptions, fit, length_batches, stopping_split

_MAX_TOKENS = 1024  # longer sequences are cut for training
_WINDOW_STEPS = 128  # through which gradients flow
_HEAD_EPOCHS = 3
_HEAD_SEQUENCES = 2  # of an update of the heads
_HEAD_ROWS = 96  # positions of a sequence in one update of the heads
_HEADS = ("refine", "later_in", "later_out", "later_trust")
_FIRST_SHARE = 0.8  # of the progress


def train_sequence(
    routes: Routes, options: TrainingOptions | None = None, progress: Progress | None = None, **sizes: int
) -> SequencePredictor:
    """Train a sequence predictor.

    Args:
        routes: to learn from; every tenth sequence only decides when to stop.
        options: seed, epochs, device.
        progress: called with the share done, 0 to 1, and a title.
        sizes: other than SequenceShape's.

    Raises:
        ConfigError: fewer than two sequences, or no such device.
    """
    options = options or TrainingOptions()
    torch.manual_seed(options.seed)
    learned, stopping = (part.cut(_MAX_TOKENS) for part in stopping_split(routes))
    table = TokenTable.count(learned)
    shape = SequenceShape(routes.num_layers, routes.num_experts, len(table.known_ids), **sizes).within_limits()
    net = SequenceNet(shape, table.popularity).to(options.torch_device)
    trainer = _Trainer(net, table, learned, stopping, options)
    trainer.train_network(progress and (lambda share, text: progress(_FIRST_SHARE * share, text)))
    trainer.train_heads(progress and (lambda share, text: progress(_FIRST_SHARE + (1 - _FIRST_SHARE) * share, text)))
    return _with_all_counts(net, table, TokenTable.count(routes))


class _Trainer:
    """One model in training, with the sequences it learns from."""

    def __init__(
        self, net: SequenceNet, table: TokenTable, learned: Routes, stopping: Routes, options: TrainingOptions
    ) -> None:
        self.net, self.table, self.learned, self.stopping, self.options = net, table, learned, stopping, options
        self.lengths = [len(token_ids) for token_ids in learned.token_ids]
        self.heads = [p for name, p in net.named_parameters() if name.partition(".")[0] in _HEADS]
        self.rest = [p for name, p in net.named_parameters() if name.partition(".")[0] not in _HEADS]

    def inputs(self, routes: Routes, sequence: int) -> SequenceInputs:
        weights = routes.weights[sequence] if routes.weights is not None else None
        return sequence_inputs(
            self.table,
            routes.token_ids[sequence],
            routes.experts[sequence],
            weights,
            leave_out=routes is self.learned,
            device=self.options.torch_device,
        )

    def train_network(self, progress: Progress | None) -> None:
        batch_size = self.options.batch_size
        mean = sum(self.lengths) / len(self.lengths)
        updates = -(-len(self.lengths) // batch_size) * max(1, round(mean / _WINDOW_STEPS + 0.5))
        fit(
            self.net,
            self.rest,
            self._network_losses,
            self._network_stopping_loss,
            self.options,
            epochs=self.options.epochs,
            updates_per_epoch=updates,
            progress=progress,
            title="recurrent network",
        )

    def train_heads(self, progress: Progress | None) -> None:
        fit(
            self.net,
            self.heads,
            self._head_losses,
            self._head_stopping_loss,
            self.options,
            epochs=_HEAD_EPOCHS,
            updates_per_epoch=-(-len(self.lengths) // _HEAD_SEQUENCES),
            progress=progress,
            title="refinement and rollout",
        )

    def _network_losses(self, rng: np.random.Generator) -> Iterator[torch.Tensor]:
        for batch in length_batches(self.lengths, self.options.batch_size, rng):
            inputs, state = pad_inputs([self.inputs(self.learned, s) for s in batch]), None
            for start in range(0, inputs.valid.shape[1], _WINDOW_STEPS):
                window = inputs.window(start, start + _WINDOW_STEPS)
                logits, _, state = self.net(window, state)
                state = state.detach()
                yield F.binary_cross_entropy_with_logits(logits.flatten(2)[window.valid], window.routes[window.valid])

    @torch.no_grad()
    def _network_stopping_loss(self) -> float:
        losses = []
        for s in range(len(self.stopping)):
            inputs = pad_inputs([self.inputs(self.stopping, s)])
            logits, _, _ = self.net(inputs)
            losses.append((len(inputs.routes[0]), F.binary_cross_entropy_with_logits(logits.flatten(2), inputs.routes)))
        return float(sum(n * loss for n, loss in losses) / sum(n for n, _ in losses))

    def _head_losses(self, rng: np.random.Generator) -> Iterator[torch.Tensor]:
        order = rng.permutation(len(self.lengths))
        for i in range(0, len(order), _HEAD_SEQUENCES):
            batch = order[i : i + _HEAD_SEQUENCES]
            yield torch.stack([self._head_loss(self.learned, s, rng) for s in batch]).mean()

    @torch.no_grad()
    def _head_stopping_loss(self) -> float:
        rng = np.random.default_rng(self.options.seed)
        return float(torch.stack([self._head_loss(self.stopping, s, rng) for s in range(len(self.stopping))]).mean())

    def _head_loss(self, routes: Routes, sequence: int, rng: np.random.Generator) -> torch.Tensor:
        """Return refinement's and rollout's loss on some positions of a sequence, given the network's answers there."""
        inputs = pad_inputs([self.inputs(routes, sequence)])
        shape = self.net.shape
        with torch.no_grad():
            logits, states, _ = self.net(inputs)
        logits, states = logits[0], states[0]
        one = SequenceInputs(**{name: value[0] for name, value in vars(inputs).items()})
        length = len(one.routes)
        at = torch.from_numpy(rng.choice(length, min(length, _HEAD_ROWS), replace=False)).to(logits.device)
        truth = one.routes.view(length, shape.num_layers, shape.num_experts)
        loss = logits.new_zeros(())
        if shape.reach:
            refined, exists = self.net.refined(logits[at], truth[at])
            anchors = torch.arange(shape.num_layers - 1)[:, None] + 1 + torch.arange(shape.reach)
            wanted = truth[at][:, anchors.clamp(max=shape.num_layers - 1)]
            loss = loss + F.binary_cross_entropy_with_logits(refined[:, exists], wanted[:, exists])
        at = at[: _HEAD_ROWS // 3]
        steps = at[:, None] + 1 + torch.arange(shape.num_later, device=at.device)
        known = steps < length
        if known.any():
            later = self.net.later(one, logits, states, at)
            wanted = truth[steps.clamp(max=length - 1)]
            loss = loss + F.binary_cross_entropy_with_logits(later[known], wanted[known])
        return loss


def _with_all_counts(net: SequenceNet, table: TokenTable, full: TokenTable) -> SequencePredictor:
    """Return the live predictor with the counts of the stopping split in it as well."""
    arrays = {name: value.detach().cpu().numpy() for name, value in net.state_dict().items()}
    arrays["embedding.weight"] = arrays["embedding.weight"][np.r_[0, table.rows(full.known_ids)]]
    shape = SequenceShape(**{**vars(net.shape), "num_known_tokens": len(full.known_ids)})
    full.popularity = table.popularity  # the biases were trained with it
    return SequencePredictor(shape, full, arrays)
