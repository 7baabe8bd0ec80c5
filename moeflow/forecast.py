"""How much it is worth to keep each expert, from a predictor's probabilities. Arrays only, no predictor here.

Times are counted in layers: the next layer is one away, the same layer of the next step L away.
"""

import numpy as np

_SELDOM = 1e-3  # probability a step that stands for never


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

    def __init__(self, num_layers: int, num_experts: int, num_steps: int = 8):
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.layer = -1  # the last one whose router has spoken in this step
        self.now = np.full((num_layers, num_experts), np.nan, np.float32)  # probability in this step
        self._later = np.zeros((num_steps, num_layers, num_experts), np.float32)
        self._worth = np.zeros((num_layers, num_experts), np.float32)
        self._fresh = False
        self._chance = np.zeros((num_steps + 1, num_layers, num_experts), np.float32)
        self._kept = np.zeros((num_steps + 1, num_layers, num_experts), np.float32)
        self._rows = np.arange(num_layers, dtype=np.float32)

    def begin_step(self, now: np.ndarray | None, later: np.ndarray | None, usual: np.ndarray) -> None:
        """Enter what is predicted before the first layer.

        Args:
            now: [L, E], probability that the coming step demands each expert; None or NaN where nothing is known.
            later: [steps, L, E], the same for the steps after it.
            usual: [L, E], probability a step of an expert of which nothing is known.
        """
        self.layer = -1
        usual = np.clip(usual, _SELDOM, 1)
        self.now[:] = usual if now is None else np.where(np.isnan(now), usual, now)
        steps = len(self._later)
        if later is None:
            self._later[:] = usual
        else:
            self._later[: len(later)] = later[:steps]
            self._later[len(later) :] = later[-1]
            if np.isnan(later).any():
                self._later[:] = np.where(np.isnan(self._later), usual, self._later)
        self._bet(slice(None), self.now)
        self._fresh = False

    def refine(self, first_layer: int, now: np.ndarray) -> None:
        """Enter what is known better by now, [n, E] for layers from `first_layer` on; NaN keeps what was known."""
        rows = slice(first_layer, first_layer + len(now))
        self.now[rows] = np.where(np.isnan(now), self.now[rows], now)
        self._bet(rows, self.now[rows])
        self._fresh = False

    def pass_layer(self, layer: int) -> None:
        """Say that a layer's router has spoken: its experts are needed in the next step at the earliest."""
        self.layer = layer
        rows = slice(layer, layer + 1)
        self._bet(rows, self._later[0, rows], first=1)
        self._fresh = False

    @property
    def worth(self) -> np.ndarray:
        """What a slot is worth for each expert, in uses a layer: [L, E]."""
        if not self._fresh:
            away = self._rows - self.layer
            away[: self.layer + 1] += self.num_layers
            np.divide(self._chance, self._kept + away[:, None], out=(found := np.empty_like(self._chance)))
            found.max(axis=0, out=self._worth)
            self._fresh = True
        return self._worth

    def _bet(self, rows: slice, soonest: np.ndarray, first: int = 0) -> None:
        """Enter the bets of some layers, whose next turn demands each expert with probability `soonest` [n, E]."""
        survival, kept = 1 - soonest, 0.0
        self._chance[0, rows], self._kept[0, rows] = soonest, 0
        for step in range(1, len(self._chance)):
            kept = kept + survival * self.num_layers
            survival = survival * (1 - self._later[min(step - 1 + first, len(self._later) - 1), rows])
            self._chance[step, rows], self._kept[step, rows] = 1 - survival, kept
