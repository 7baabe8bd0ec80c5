"""Several predictors as one: it learns online whom to trust, for each layer and each distance."""

import numpy as np

from moeflow.errors import ConfigError
from moeflow.predictors.odds import log_odds, multi_hot, sigmoid
from moeflow.predictors.protocol import Predictor

_LEARNING_RATE = 0.02
_LARGEST = 3.0  # weight of a member


class Ensemble:
    """Mixes its members' log-odds by weights that follow the gradient of the log-likelihood.

    A member that has not refined a layer stands by what it said before. Weights outlive `begin`. The steps after the
    coming one are those of the first member that predicts them.

    Args:
        members: predictors of the same model.
        learning_rate: of the weights; 0 keeps them even.

    Raises:
        ConfigError: no members, members of different models, or two kinds of signal wanted.
    """

    name = "ensemble"

    def __init__(self, members: list[Predictor], *, learning_rate: float = _LEARNING_RATE):
        sizes = {(member.num_layers, member.num_experts) for member in members}
        if len(sizes) != 1:
            raise ConfigError(f"an ensemble of members for {sorted(sizes)} layers and experts. Allowed: one model's.")
        signals = {member.signal for member in members} - {"none"}
        if len(signals) > 1:
            raise ConfigError(f"an ensemble of members that want {sorted(signals)}. Allowed: one kind of signal.")
        self.members, self._learning_rate = list(members), learning_rate
        ((self.num_layers, self.num_experts),) = sizes
        self.signal = signals.pop() if signals else "none"
        self.reach = max(member.reach for member in members)
        shape = (self.reach + 1, self.num_layers, len(members))  # distance 0: before the step
        self.weights = np.full(shape, 1 / len(members), np.float32)
        self.begin(1)

    def begin(self, num_sequences: int) -> None:
        for member in self.members:
            member.begin(num_sequences)
        opinions = (len(self.members), num_sequences, self.num_layers, self.num_experts)
        self._opinions = np.full(opinions, np.nan, np.float32)  # log-odds, the latest
        self._said = np.full((self.reach + 1, *opinions), np.nan, np.float32)  # by distance
        self._answered = np.full((self.reach + 1, *opinions[1:]), np.nan, np.float32)
        self._demanded = np.zeros(opinions[1:], np.float32)

    def prefill(self, token_ids: np.ndarray, experts: np.ndarray, weights: np.ndarray | None) -> None:
        for member in self.members:
            member.prefill(token_ids, experts, weights)

    def step(self, token_ids: np.ndarray) -> np.ndarray | None:
        self._said[:], self._answered[:] = np.nan, np.nan
        for opinion, member in zip(self._opinions, self.members, strict=True):
            probability = member.step(token_ids)
            opinion[:] = np.nan if probability is None else log_odds(probability)
        answer = self._mix(0, slice(None))
        return None if np.isnan(answer).all() else answer

    def observe(
        self, layer: int, experts: np.ndarray, weights: np.ndarray | None, signal: np.ndarray | None = None
    ) -> np.ndarray | None:
        self._demanded[:, layer] = multi_hot(experts, self.num_experts)
        for opinion, member in zip(self._opinions, self.members, strict=True):
            refined = member.observe(layer, experts, weights, signal if member.signal != "none" else None)
            if refined is not None:
                kept = opinion[:, layer + 1 : layer + 1 + refined.shape[1]]
                new = log_odds(refined)
                np.copyto(kept, new, where=~np.isnan(new))
        if layer == self.num_layers - 1:
            self._learn()
            return None
        known = min(self.reach, self.num_layers - 1 - layer)
        if not known:
            return None
        answers = [
            self._mix(distance, slice(layer + distance, layer + distance + 1)) for distance in range(1, known + 1)
        ]
        answer = np.concatenate(answers, 1)
        return None if np.isnan(answer).all() else answer

    def later(self) -> np.ndarray | None:
        return next((steps for member in self.members if (steps := member.later()) is not None), None)

    def _mix(self, distance: int, layers: slice) -> np.ndarray:
        """Answer for layers at a distance, [B, n, E]; NaN where no member knows anything."""
        opinions = self._opinions[:, :, layers]
        weights = self.weights[distance, layers].T[:, None, :, None]  # [M, 1, n, 1]
        absent = np.isnan(opinions)
        present = np.where(absent, 0.0, weights)
        # those who are silent leave their weight to the others
        share = weights.sum(0) / np.maximum(np.abs(present).sum(0), 1e-6)
        logits = (present * np.where(absent, 0.0, opinions)).sum(0) * share
        answer = np.where(absent.all(0), np.float32(np.nan), sigmoid(logits))
        self._said[distance][:, :, layers] = opinions
        self._answered[distance][:, layers] = answer
        return answer

    def _learn(self):
        """Move every weight along the gradient of what was demanded."""
        took_part = self._demanded.any((1, 2))
        if not self._learning_rate or not took_part.any():
            return
        error = np.nan_to_num(self._demanded - self._answered)[:, took_part]  # [D + 1, B, L, E]
        said = np.nan_to_num(self._said)[:, :, took_part]
        gradient = np.einsum("dble,dmble->dlm", error, said) / took_part.sum()
        self.weights += self._learning_rate / self.num_experts * gradient
        np.clip(self.weights, 0.0, _LARGEST, out=self.weights)
