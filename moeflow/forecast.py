"""When each expert is expected to be demanded next, from a predictor's probabilities. Arrays only, no predictor here.

The frame of all times: layers from the first layer of the step under way. Layer l of this step is at l, of the next
step at L + l, and so on.
"""

import numpy as np

_LONGEST_STEPS = 1000.0  # between two uses: what a probability of zero stands for


class Forecast:
    """Expected next use of every expert, moved on layer by layer.

    An expert's next use comes at layer l of this step with probability p0, of the next with (1 - p0) p1, ...; beyond
    the predicted steps, and where nothing is predicted, it comes back as usual. What counts is the expectation: Belady
    with probabilities in place of knowledge.

    Args:
        num_layers: L.
        num_experts: E, the largest number of experts in a layer.
    """

    def __init__(self, num_layers: int, num_experts: int):
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.layer = -1  # the last one whose router has spoken in this step
        self.now = np.full((num_layers, num_experts), np.nan, np.float32)  # probability in this step
        self.next_use = np.full((num_layers, num_experts), np.nan)
        self._later = np.full((num_layers, num_experts), np.nan)  # layers until the next use, if it is not in this step
        self._first_layer = np.arange(num_layers, dtype=np.float64)[:, None]

    def begin_step(self, now: np.ndarray | None, later: np.ndarray | None, usual_steps: np.ndarray) -> None:
        """Enter what is predicted before the first layer.

        Args:
            now: [L, E], probability that the coming step demands each expert; None or NaN where nothing is known.
            later: [steps, L, E], the same for the steps after it.
            usual_steps: [L, E], in how many steps an expert comes back of which nothing is known.
        """
        self.layer = -1
        steps = np.clip(usual_steps, 1.0, _LONGEST_STEPS)
        self.now[:] = np.nan if now is None else now
        for probability in () if later is None else later[::-1]:
            steps = np.where(np.isnan(probability), steps, 1 + (1 - probability) * steps)
        np.multiply(steps, self.num_layers, out=self._later)
        self._unknown = 1 - 1 / steps  # probability of no use in this step, where nothing is predicted
        self._enter(slice(None), self.now)

    def refine(self, first_layer: int, now: np.ndarray) -> None:
        """Enter what is known better by now, [n, E] for layers from `first_layer` on; NaN keeps what was known."""
        rows = slice(first_layer, first_layer + len(now))
        if np.isnan(now).any():
            now = np.where(np.isnan(now), self.now[rows], now)
        self.now[rows] = now
        self._enter(rows, now)

    def pass_layer(self, layer: int) -> None:
        """Say that a layer's router has spoken: its experts are needed in the next step at the earliest."""
        self.layer = layer
        np.add(self._later[layer], layer, out=self.next_use[layer])

    def _enter(self, rows: slice, now: np.ndarray) -> None:
        absent = 1 - now
        if np.isnan(absent).any():
            absent = np.where(np.isnan(absent), self._unknown[rows], absent)
        np.multiply(absent, self._later[rows], out=self.next_use[rows])
        self.next_use[rows] += self._first_layer[rows]

    def demote(self, layer: int, expert: int) -> None:
        """Say that an expert was predicted and not demanded: nothing is expected of it before the next prediction."""
        self.next_use[layer, expert] = _LONGEST_STEPS * self.num_layers
