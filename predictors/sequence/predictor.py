"""Sequence predictor, live: one step of the recurrent model and its evidence, in numpy, for B sequences at once."""

import numpy as np

from moeflow.predictors.odds import log_odds, multi_hot, sigmoid, weighted_hot
from moeflow.predictors.sequence.inputs import (
    NUM_EVIDENCE,
    RECALL_HALF_LIFE,
    RECENT_HALF_LIVES,
    best_repeat,
    context,
)
from moeflow.predictors.sequence.net import NUM_LATER_EVIDENCE, SequenceShape
from moeflow.predictors.sequence.repeats import RepeatFinder
from moeflow.predictors.sequence.token_table import PRIOR_TOKENS, TokenTable

_PROMPT_STEPS = 64  # last steps of a prompt, which the recurrent state goes through
_RECENT_DECAYS = np.array([2 ** (-1 / half_life) for half_life in RECENT_HALF_LIVES], np.float32)
_MEMORY_STEPS = 2048  # of a sequence's own routes; older ones have faded from all other evidence too
_RECALL_DECAY = 2 ** (-1 / RECALL_HALF_LIFE)


class _Past:
    """One sequence's routes so far, and those of each of its tokens when it was fed before."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.position = 0
        self.finder = RepeatFinder()
        self._routes = np.zeros((64, num_layers * num_experts), bool)
        self._recall: dict[int, tuple[np.ndarray, float, int]] = {}  # token -> decayed routes, their number, position
        self._unknown = np.zeros(num_layers * num_experts, np.float32)
        self.token_id = -1
        self.repeats, self.run = [-1, -1, -1], 0

    def feed(self, token_id: int) -> tuple[np.ndarray, float]:
        """Take in a token; return the routes [L * E] it took earlier, decayed, and their number."""
        self.token_id = token_id
        self.repeats, self.run = self.finder.feed(token_id)
        routes, number, position = self._recall.get(token_id, (self._unknown, 0.0, 0))
        decay = _RECALL_DECAY ** (self.position - position)
        return routes * np.float32(decay), number * decay

    def add(self, routes: np.ndarray, recalled: np.ndarray, number: float) -> None:
        """Take in the routes [L * E] of the token just fed; `recalled` and `number` come from feed."""
        if self.position == len(self._routes) < _MEMORY_STEPS:
            self._routes = np.concatenate([self._routes, np.zeros_like(self._routes)])
        self._routes[self.position % len(self._routes)] = routes
        self._recall[self.token_id] = (recalled + routes, number + 1.0, self.position)
        self.position += 1
        if self.position % _MEMORY_STEPS == 0:
            oldest = self.position - _MEMORY_STEPS
            self._recall = {token: entry for token, entry in self._recall.items() if entry[2] >= oldest}

    def at(self, position: int) -> np.ndarray:
        """Return the routes at a position; zeros for -1 and for positions older than the memory."""
        return self._routes[position % len(self._routes)] if self._knows(position) else self._unknown

    def after(self, position: int, num_steps: int) -> np.ndarray:
        """Return [num_steps, L * E]: the routes after a position, repeated as often as needed."""
        if not self._knows(position):
            return np.zeros((num_steps, len(self._unknown)), np.float32)
        steps = np.arange(1, num_steps + 1) % (self.position - position)
        return self._routes[(position + steps) % len(self._routes)].astype(np.float32)

    def _knows(self, position: int) -> bool:
        return position >= max(0, self.position - _MEMORY_STEPS)


class SequencePredictor:
    """Predicts from all layers' routes of the past steps, the token just fed, and repeats.

    Args:
        shape: sizes.
        table: counts of training.
        arrays: SequenceNet's parameters by name.
    """

    name = "sequence"
    signal = "none"

    def __init__(self, shape: SequenceShape, table: TokenTable, arrays: dict[str, np.ndarray]) -> None:
        self.shape, self.table = shape, table
        self.num_layers, self.num_experts, self.reach = shape.num_layers, shape.num_experts, shape.reach
        self.arrays = arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
        self._embedding = arrays["embedding.weight"]
        self._inward = arrays["inward.weight"].T, arrays["inward.bias"]
        self._input_gates = arrays["recurrent.weight_ih_l0"].T, arrays["recurrent.bias_ih_l0"]
        self._state_gates = arrays["recurrent.weight_hh_l0"].T, arrays["recurrent.bias_hh_l0"]
        self._outward = arrays["outward.weight"].T
        self._bias = arrays["bias"]
        self._trust = arrays["trust.weight"].T, arrays["trust.bias"]
        self._refine = arrays["refine"]
        self._later_in = arrays["later_in.weight"].T, arrays["later_in.bias"]
        self._later_out = arrays["later_out.weight"].T
        self._later_trust = arrays["later_trust.weight"].T, arrays["later_trust.bias"]
        self._popularity = np.ascontiguousarray(table.popularity, np.float32).ravel()
        self._general = log_odds(self._popularity)
        self.begin(1)

    def begin(self, num_sequences: int) -> None:
        shape, flat = self.shape, self.num_layers * self.num_experts
        self._past = [_Past(self.num_layers, self.num_experts) for _ in range(num_sequences)]
        self._state = np.zeros((num_sequences, shape.width), np.float32)
        self._previous = np.zeros((num_sequences, flat), np.float32)  # weighted
        self._previous_routes = np.zeros((num_sequences, flat), np.float32)
        self._previous_rows = np.zeros(num_sequences, np.int64)
        self._recent = np.zeros((num_sequences, len(RECENT_HALF_LIVES), flat), np.float32)
        self._recent_steps = np.zeros((num_sequences, len(RECENT_HALF_LIVES)), np.float32)
        self._sequences = np.arange(num_sequences)[:, None]
        self._surprise = np.zeros((num_sequences, self.num_experts + 1), np.float32)
        self._chosen: list[np.ndarray] = []  # of the step under way, by layer
        self._chosen_weights: list[np.ndarray | None] = []
        # row a: refinement of layers a + 1 to a + reach after layer a
        rows = self.num_layers + shape.memory
        self._heard = np.zeros((num_sequences, rows, self.reach, self.num_experts), np.float32)
        self._coming = np.zeros((num_sequences, self.num_layers + self.reach, self.num_experts), np.float32)
        self._probability = np.zeros((num_sequences, self.num_layers, self.num_experts), np.float32)
        self._asked: np.ndarray | None = None  # [B], the position whose continuation each sequence repeats

    def prefill(self, token_ids: np.ndarray, experts: np.ndarray, weights: np.ndarray | None) -> None:
        length = token_ids.shape[1]
        valid = experts[:, :, 0, 0] < self.num_experts
        for t in range(length):
            hot = multi_hot(experts[:, t], self.num_experts).reshape(len(token_ids), -1)
            fed = np.flatnonzero(valid[:, t])
            rows = self.table.rows(token_ids[:, t])
            if t >= length - _PROMPT_STEPS:
                self._state[fed] = self._recur(self._tokens(rows))[fed]
                weighted = None if weights is None else weights[:, t]
                self._previous[fed] = weighted_hot(experts[:, t], weighted, self.num_experts).reshape(hot.shape)[fed]
            for b in fed:
                past = self._past[b]
                past.add(hot[b] > 0, *past.feed(int(token_ids[b, t])))
            self._previous_rows[fed] = rows[fed]
            self._end_step(hot, fed)

    def step(self, token_ids: np.ndarray) -> np.ndarray:
        num_sequences = len(self._past)
        rows = self.table.rows(token_ids)
        fed = [past.feed(int(token)) for past, token in zip(self._past, token_ids, strict=True)]
        repeats = np.array([past.repeats for past in self._past])
        self._fed_rows, self._fed = rows, fed
        self._context = context(
            self.table.num_seen[rows],
            np.array([number for _, number in fed]),
            repeats,
            np.array([past.run for past in self._past]),
            np.array([past.position for past in self._past]),
        )
        self._evidence = self._gather_evidence(rows, fed, repeats)
        tokens = self._tokens(rows)
        self._state = self._recur(tokens)
        trust = np.concatenate([self._context, self._state], 1) @ self._trust[0] + self._trust[1]
        trust = trust.reshape(num_sequences, NUM_EVIDENCE, self.num_layers, 1)
        evidence = self._evidence.reshape(num_sequences, NUM_EVIDENCE, self.num_layers, self.num_experts)
        logits = np.concatenate([self._state, tokens], 1) @ self._outward + self._bias
        logits = logits.reshape(num_sequences, self.num_layers, self.num_experts) + (trust * evidence).sum(1)
        self._coming[:, : self.num_layers] = logits
        self._probability = sigmoid(logits)
        self._heard[:] = 0.0
        self._chosen, self._chosen_weights = [], []
        self._asked = best_repeat(repeats)
        return self._probability

    def observe(
        self, layer: int, experts: np.ndarray, weights: np.ndarray | None, signal: np.ndarray | None = None
    ) -> np.ndarray | None:
        num_experts = self.num_experts
        self._chosen.append(experts)
        self._chosen_weights.append(weights)
        if layer == self.num_layers - 1:
            self._finish_step()
            return None
        surprise = self._surprise  # routes less their probability; the last column takes in experts that stand for none
        np.negative(self._probability[:, layer], out=surprise[:, :num_experts])
        surprise[self._sequences, np.minimum(experts, num_experts)] += 1.0
        told = surprise[:, :num_experts] @ self._refine[layer]
        heard = self._heard[:, layer : layer + self.shape.memory]
        heard += told.reshape(heard.shape)
        known = min(self.reach, self.num_layers - 1 - layer)
        return sigmoid(self._coming[:, layer + 1 : layer + 1 + known] + self._heard[:, layer, :known])

    def later(self) -> np.ndarray | None:
        if self._asked is None:
            return None
        shape, num_sequences = self.shape, len(self._past)
        full = (num_sequences, shape.num_later, self.num_layers, self.num_experts)
        ranks = np.tanh(self._state @ self._later_in[0] + self._later_in[1])
        logits = ranks.reshape(num_sequences, shape.num_later, -1) @ self._later_out + self._bias
        trust = self._context @ self._later_trust[0] + self._later_trust[1]
        trust = trust.reshape(num_sequences, shape.num_later, NUM_LATER_EVIDENCE, self.num_layers, 1)
        coming = self._coming[:, : self.num_layers].reshape(num_sequences, -1) - self._bias
        copied = np.stack([past.after(at, shape.num_later) for past, at in zip(self._past, self._asked, strict=True)])
        logits = logits.reshape(full)
        for number, known in enumerate((coming, self._evidence[:, 2], self._evidence[:, 3])):
            logits += trust[:, :, number] * known.reshape(num_sequences, 1, self.num_layers, self.num_experts)
        logits += trust[:, :, -1] * copied.reshape(full)
        return sigmoid(logits)

    def _tokens(self, rows: np.ndarray) -> np.ndarray:
        """Return the embeddings of the token fed and of the one before it: [B, 2 * token_width]."""
        return np.concatenate([self._embedding[rows], self._embedding[self._previous_rows]], 1)

    def _recur(self, tokens: np.ndarray) -> np.ndarray:
        """Return the next recurrent states [B, width]."""
        inward = np.concatenate([self._previous, tokens], 1) @ self._inward[0] + self._inward[1]
        by_input = np.maximum(inward, 0.0) @ self._input_gates[0] + self._input_gates[1]
        by_state = self._state @ self._state_gates[0] + self._state_gates[1]
        width = self.shape.width
        reset, update = np.split(sigmoid(by_input[:, : 2 * width] + by_state[:, : 2 * width]), 2, axis=1)
        new = np.tanh(by_input[:, 2 * width :] + reset * by_state[:, 2 * width :])
        return new + update * (self._state - new)

    def _gather_evidence(
        self, rows: np.ndarray, fed: list[tuple[np.ndarray, float]], repeats: np.ndarray
    ) -> np.ndarray:
        """Return [B, NUM_EVIDENCE, L * E], as sequence_inputs does."""
        evidence = np.empty((len(rows), NUM_EVIDENCE, len(self._popularity)), np.float32)
        counts = self.table.counts[rows].reshape(len(rows), -1)
        num_seen = self.table.num_seen[rows, None].astype(np.float32)
        token = (counts + PRIOR_TOKENS * self._popularity) / (num_seen + PRIOR_TOKENS)
        evidence[:, 0] = token
        for b, (recalled, number) in enumerate(fed):
            evidence[b, 1] = (recalled + token[b]) / np.float32(number + 1)
        evidence[:, 2:4] = (self._recent + self._popularity) / (self._recent_steps[:, :, None] + 1)
        evidence[:, :4] = log_odds(evidence[:, :4])
        evidence[:, 1] -= evidence[:, 0]
        evidence[:, (0, 2, 3)] -= self._general
        for b, past in enumerate(self._past):
            for order, position in enumerate(repeats[b]):
                evidence[b, 4 + order] = past.at(position)
        evidence[:, 7] = self._previous_routes
        return evidence

    def _finish_step(self) -> None:
        """Take in the routes of the whole step, for the sequences that took part in it."""
        num_sequences = len(self._past)
        chosen = np.stack(self._chosen, 1)
        known = [of_layer for of_layer in self._chosen_weights if of_layer is not None]
        weights = np.stack(known, 1) if len(known) == len(self._chosen) else None
        hot = multi_hot(chosen, self.num_experts).reshape(num_sequences, -1)
        for b, past in enumerate(self._past):
            past.add(hot[b] > 0, *self._fed[b])
        fed = np.flatnonzero(hot.any(1))
        self._previous[fed] = weighted_hot(chosen, weights, self.num_experts).reshape(hot.shape)[fed]
        self._previous_rows[fed] = self._fed_rows[fed]
        self._end_step(hot, fed)

    def _end_step(self, hot: np.ndarray, fed: np.ndarray) -> None:
        self._previous_routes[fed] = hot[fed]
        self._recent[fed] = (self._recent[fed] + hot[fed, None]) * _RECENT_DECAYS[:, None]
        self._recent_steps[fed] = (self._recent_steps[fed] + 1) * _RECENT_DECAYS
