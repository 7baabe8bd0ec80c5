"""The worth of keeping each expert, from a predictor's probabilities. Arrays only, no predictor here.

Times are counted in layers: the next layer is one away, the same layer of the next step L away.
"""

import numpy as np

_MIN_PROBABILITY = 1e-3  # a step, of an expert that was never used


class Forecast:
    """The worth of a slot for every expert, moved on layer by layer.

    An expert is demanded in this step with probability p0, in the next one for the first time with (1 - p0) p1, and so
    on. A slot kept for it until the h-th step from now is worth P(demanded by then) / E[layers the slot is kept], and
    an expert's worth is that of the best h: the index that orders independent bets on one scarce resource (Gittins).
    The expected next use alone would be ruled by the far future, of which little is known.

    Args:
        num_layers: L.
        num_experts: E, the largest number of experts in a layer.
        num_steps: how many steps ahead bets go.
    """

    def __init__(self, num_layers: int, num_experts: int, num_steps: int = 4) -> None:
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.layer = -1  # the last one whose router has run in this step
        self.now = np.full((num_layers, num_experts), np.nan, np.float32)  # probability in this step
        self._later = np.zeros((num_steps, num_layers, num_experts), np.float32)
        self._worth = np.zeros((num_layers, num_experts), np.float32)
        self._fresh = False
        # Bets by their last step, for the turn each layer has next: chance to win, layers the slot is kept if the
        # first turn does not win. Then the same as they stand once the layer's turn in this step is over, and the
        # chance that none of the later turns wins.
        bets = (num_steps + 1, num_layers, num_experts)
        self._chance, self._kept, self._passed_chance, self._passed_kept, self._survival, self._spent = (
            np.zeros(bets, np.float32) for _ in range(6)
        )
        self._rows = np.arange(num_layers, dtype=np.float32)

    def begin_step(self, now: np.ndarray | None, later: np.ndarray | None, usual: np.ndarray) -> None:
        """Enter the prediction made before the first layer of a step.

        Args:
            now: [<= L, E], probability that the coming step demands each expert of the first layers; None or NaN where
                nothing is known.
            later: [steps, <= L, E], the same for the steps after it.
            usual: [L, E], probability a step of each expert, where the others say nothing.
        """
        self.layer = -1
        usual = np.clip(usual, _MIN_PROBABILITY, 1)
        self.now[:] = usual
        if now is not None:
            self.now[: len(now)] = np.where(np.isnan(now), usual[: len(now)], now)
        steps, self._later[:] = len(self._later), usual
        if later is not None:
            known = self._later[:, : later.shape[1]]
            known[: len(later)] = later[:steps]
            known[len(later) :] = later[-1]
            if np.isnan(later).any():
                self._later[:] = np.where(np.isnan(self._later), usual, self._later)
        np.cumprod(1 - self._later, axis=0, out=self._survival[1:])
        self._survival[0] = 1
        np.cumsum(self._survival[:-1] * self.num_layers, axis=0, out=self._spent[1:])
        self._passed_chance[:-1], self._passed_chance[-1] = 1 - self._survival[1:], 1 - self._survival[-1]
        np.subtract(self._spent[1:], self.num_layers, out=self._passed_kept[:-1])
        self._passed_kept[-1] = self._passed_kept[-2]
        self._bet(slice(None), self.now)

    def refine(self, first_layer: int, now: np.ndarray) -> None:
        """Enter better probabilities, [n, E] for layers from `first_layer` on; NaN keeps the old one."""
        rows = slice(first_layer, first_layer + len(now))
        self.now[rows] = now if not np.isnan(now).any() else np.where(np.isnan(now), self.now[rows], now)
        self._bet(rows, self.now[rows])

    def pass_layer(self, layer: int) -> None:
        """Move on behind a layer whose router has run: its experts are needed in the next step at the earliest."""
        self.layer = layer
        self._chance[:, layer], self._kept[:, layer] = self._passed_chance[:, layer], self._passed_kept[:, layer]
        self._fresh = False

    @property
    def worth(self) -> np.ndarray:
        """The worth of a slot for each expert, in uses a layer: [L, E]."""
        if not self._fresh:
            away = self._rows - self.layer
            away[: self.layer + 1] += self.num_layers
            np.divide(self._chance, self._kept + away[:, None], out=(found := np.empty_like(self._chance)))
            found.max(axis=0, out=self._worth)
            self._fresh = True
        return self._worth

    def _bet(self, rows: slice, soonest: np.ndarray) -> None:
        """Enter the bets of layers whose turn in this step is to come, with probability `soonest` [n, E]."""
        lost = 1 - soonest
        np.multiply(self._survival[:, rows], lost, out=self._chance[:, rows])
        np.subtract(1, self._chance[:, rows], out=self._chance[:, rows])
        np.multiply(self._spent[:, rows], lost, out=self._kept[:, rows])
        self._fresh = False
