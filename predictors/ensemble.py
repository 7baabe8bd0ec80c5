"""Ensemble of predictors: it learns online how much each counts, for each layer and each distance."""

import numpy as np

from moeflow.errors import ConfigError
from moeflow.predictors.odds import log_odds, multi_hot, sigmoid
from moeflow.predictors.protocol import Predictor

_LEARNING_RATE = 0.1
_SQUARES_DECAY = 0.999  # a step
_MAX_WEIGHT = 3.0  # of a member


class Ensemble:
    """Mixes its members' log-odds by weights that follow the gradient of the log-likelihood, by AdaGrad.

    A member that has not refined a layer keeps its opinion from before. Weights outlive `begin`. The steps after the
    coming one are those of the first member that predicts them.

    Args:
        members: predictors of the same model.
        learning_rate: first step of a weight; 0 keeps them even.

    Raises:
        ConfigError: no members, members of different models, or two kinds of signal wanted.
    """

    name = "ensemble"

    def __init__(self, members: list[Predictor], *, learning_rate: float = _LEARNING_RATE) -> None:
        sizes = {(member.num_layers, member.num_experts) for member in members}
        if len(sizes) != 1:
            raise ConfigError(f"an ensemble of members for {sorted(sizes)} layers and experts. Allowed: one model's.")
        signals = {member.signal for member in members} - {"none"}
        if len(signals) > 1:
            raise ConfigError(f"an ensemble of members that want {sorted(signals)}. Allowed: one kind of signal.")
        self.members, self._learning_rate = list(members), learning_rate
        ((self.num_layers, self.num_experts),) = sizes
        self.signal = signals.pop() if signals else "none"
        wanting = [member for member in self.members if member.signal != "none"]
        if len(wanting) == 1 and hasattr(wanting[0], "ask"):
            self.ask = wanting[0].ask  # of a residual stream on a GPU
        self.reach = max(member.reach for member in members)
        shape = (self.reach + 1, self.num_layers, len(members))  # distance 0: before the step
        self.weights = np.full(shape, 1 / len(members), np.float32)
        self._squares = np.zeros(shape, np.float32)  # of the gradients: a weight's steps shrink as they add up
        self.begin(1)

    def begin(self, num_sequences: int) -> None:
        for member in self.members:
            member.begin(num_sequences)
        opinions = (len(self.members), num_sequences, self.num_layers, self.num_experts)
        self._opinions = np.full(opinions, np.nan, np.float32)  # log-odds, the latest
        said = (self.reach + 1, self.num_layers, len(self.members), num_sequences, self.num_experts)
        self._said = np.full(said, np.nan, np.float32)  # opinions by distance and layer
        self._answered = np.full((*said[:2], *said[3:]), np.nan, np.float32)
        self._chosen: list[np.ndarray] = []  # of the step under way, by layer
        self._complete = False  # whether every member has an opinion on everything

    def prefill(self, token_ids: np.ndarray, experts: np.ndarray, weights: np.ndarray | None) -> None:
        for member in self.members:
            member.prefill(token_ids, experts, weights)

    def step(self, token_ids: np.ndarray) -> np.ndarray | None:
        self._said.fill(np.nan)
        self._answered.fill(np.nan)
        for opinion, member in zip(self._opinions, self.members, strict=True):
            probability = member.step(token_ids)
            opinion[:] = np.nan if probability is None else log_odds(probability)
        self._chosen, self._complete = [], not np.isnan(self._opinions).any()
        answer = self._mix(np.zeros(self.num_layers, np.intp), np.arange(self.num_layers))
        return None if np.isnan(answer).all() else answer

    def observe(
        self, layer: int, experts: np.ndarray, weights: np.ndarray | None, signal: np.ndarray | None = None
    ) -> np.ndarray | None:
        self._chosen.append(experts)
        for opinion, member in zip(self._opinions, self.members, strict=True):
            refined = member.observe(layer, experts, weights, signal if member.signal != "none" else None)
            if refined is not None:
                new, rows = log_odds(refined), slice(layer + 1, layer + 1 + refined.shape[1])
                opinion[:, rows] = np.where(np.isnan(new), opinion[:, rows], new)
        if layer == self.num_layers - 1:
            self._learn()
            return None
        known = min(self.reach, self.num_layers - 1 - layer)
        if not known:
            return None
        distances = np.arange(1, known + 1)
        answer = self._mix(distances, layer + distances)
        return None if not self._complete and np.isnan(answer).all() else answer

    def later(self) -> np.ndarray | None:
        return next((steps for member in self.members if (steps := member.later()) is not None), None)

    def _mix(self, distances: np.ndarray, layers: np.ndarray) -> np.ndarray:
        """Answer for layers [n] at distances [n], as [B, n, E]; NaN where no member knows anything."""
        opinions = self._opinions[:, :, layers].transpose(2, 0, 1, 3)  # [n, M, B, E]
        weights = self.weights[distances, layers][:, :, None, None]
        if self._complete:
            answer = sigmoid((weights * opinions).sum(1))
        else:  # members without an opinion leave their weight to the others
            silent = np.isnan(opinions)
            present = np.where(silent, np.float32(0), weights)
            share = weights.sum(1) / np.maximum(present.sum(1), 1e-6)
            logits = (present * np.where(silent, np.float32(0), opinions)).sum(1) * share
            answer = np.where(silent.all(1), np.float32(np.nan), sigmoid(logits))
        self._said[distances, layers], self._answered[distances, layers] = opinions, answer
        return answer.transpose(1, 0, 2)

    def _learn(self) -> None:
        """Move every weight along the gradient of the likelihood of the experts demanded."""
        demanded = multi_hot(np.stack(self._chosen), self.num_experts)  # [L, B, E]
        took_part = demanded.any((0, 2))
        if not self._learning_rate or not took_part.any():
            return
        error = np.nan_to_num(demanded - self._answered)[:, :, None, took_part]  # [D + 1, L, 1, B, E]
        said = np.nan_to_num(self._said[:, :, :, took_part])
        gradient = (error * said).sum((3, 4)) / took_part.sum()
        self._squares = _SQUARES_DECAY * self._squares + gradient**2
        self.weights += self._learning_rate * gradient / np.sqrt(self._squares + 1e-6)
        np.clip(self.weights, 0.0, _MAX_WEIGHT, out=self.weights)
