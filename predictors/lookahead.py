"""Predictor from the coming layers' own routers: norm and router of each, on this layer's residual stream. No training.

The residual stream changes little from layer to layer, so a router that runs one to three layers early is mostly right.
Norm and router are folded into one matrix a layer, and the coming layers' matrices lie one after another, so that all
of them together are one small matrix-vector product. Source: "Speculating Experts" (next layer, no training).
"""

import numpy as np
import torch

_LEARNING_RATE = 0.05
_FIRST_UPDATES = 300  # the calibration learns at every step until then
_LEARN_EVERY_STEPS = 8  # after that
_MIN_MARGIN = -10.0  # margins below it count as this
_MIN_AGREEMENT = 0.9  # share of the router's own choices that a usable folded router makes too
_CHECKED_ROWS = 16
_SMALL_BYTES = 64 << 20  # of float32 routers: above it they stay in the model's dtype


class Lookahead:
    """Predicts one to three layers ahead from the residual stream.

    How likely an expert is follows from how far its score lies above or below the K-th best, in standard deviations
    of the layer's scores, by a logistic curve a distance that is fitted while the model runs. A layer whose folded
    router does not choose as the model's own does (checked on the first tokens) is not `usable` and not predicted.

    Args:
        routers: L tensors [E, H], each layer's router with the weight of the norm before it multiplied in; None for a
            layer that cannot be asked.
        biases: L tensors [E] or None.
        eps: of each layer's norm.
        top_k: K.
        reach: how many layers ahead.
        stride: the routers run at every stride-th layer only, for a stride-th of the cost; at most `reach`.
    """

    name = "lookahead"
    signal = "residual"

    def __init__(
        self,
        routers: list[torch.Tensor | None],
        biases: list[torch.Tensor | None],
        eps: list[float],
        top_k: int,
        reach: int = 4,
        stride: int = 2,
    ) -> None:
        routers = [None if router is None else router.detach() for router in routers]
        known = next(router for router in routers if router is not None)
        self.num_layers = len(routers)
        self.num_experts = max(len(router) for router in routers if router is not None)
        self.reach = min(reach, self.num_layers - 1)
        self._stride = max(1, min(stride, self.reach))
        self._top_k = top_k
        shape = (self.num_layers, self.num_experts, known.shape[1])
        small = 4 * int(np.prod(shape)) <= _SMALL_BYTES
        self._dtype = torch.float32 if small else known.dtype
        self._routers = torch.zeros(shape, dtype=self._dtype, device=known.device)
        self._biases: np.ndarray | None = np.zeros(shape[:2], np.float32)
        self.usable = np.zeros(self.num_layers, bool)
        for layer, router in enumerate(routers):
            if router is not None:
                self._routers[layer, : len(router)] = router
                self._biases[layer, len(router) :] = -np.inf  # a smaller layer has no such expert
                bias = biases[layer]
                if bias is not None:
                    self._biases[layer, : len(router)] = bias.detach().float().cpu().numpy()
                self.usable[layer] = True
        if not self._biases.any():
            self._biases = None
        on_cpu = self._dtype == torch.float32 and self._routers.device.type == "cpu"
        self._arrays = np.ascontiguousarray(self._routers.flatten(0, 1).numpy().T) if on_cpu else None
        self._spread = np.zeros(self.num_layers, np.float32)  # of each layer's margins
        self._eps = eps
        self._rows_to_check = np.full(self.num_layers, _CHECKED_ROWS)  # rows of each layer still to be compared
        self._agreed = np.zeros(self.num_layers)
        self._slope, self._offset = np.full(self.reach, 3.0, np.float32), np.zeros(self.reach, np.float32)
        self._num_updates = 0
        self._steps = 0
        self._learning = True
        self._margins: dict[int, list[tuple[int, np.ndarray]]] = {}  # layer -> (distance - 1, [B, E])

    @property
    def unchecked(self) -> np.ndarray:
        """Which layers' folded routers have not been compared enough with the model's own: bool [L]."""
        return self._rows_to_check > 0

    def begin(self, num_sequences: int) -> None:
        """Forget the predictions of the layers to come; the calibration stays."""
        self._margins.clear()

    def prefill(self, token_ids: np.ndarray, experts: np.ndarray, weights: np.ndarray | None) -> None:
        """Ignore the routes of a prompt: the calibration needs the residual stream."""

    def step(self, token_ids: np.ndarray) -> None:
        """Begin a step; nothing is known before the first layer."""
        self._margins.clear()
        self._steps += 1
        self._learning = self._num_updates < _FIRST_UPDATES or self._steps % _LEARN_EVERY_STEPS == 0

    def later(self) -> None:
        """Return None: nothing is known of later steps."""

    @torch.no_grad()
    def observe(
        self,
        layer: int,
        experts: np.ndarray,
        weights: np.ndarray | None,
        signal: torch.Tensor | np.ndarray | None = None,
    ) -> np.ndarray | None:
        """Run the next layers' routers on the residual stream [B, H], or take what `ask` gave; return [B, n, E]."""
        if self._rows_to_check[layer] and signal is not None:
            if isinstance(signal, np.ndarray):
                own, signal = self._biased(signal[:, :1], layer), signal[:, 1:]
            else:
                own = self._scores(layer, layer + 1, signal)
            self._check(layer, experts, own[:, 0])
        if self._learning:
            self._learn(layer, experts)
        last = self._last_asked(layer)
        if signal is None or last == layer:
            return None
        if isinstance(signal, np.ndarray):
            scores = self._biased(signal, layer + 1)
        else:
            scores = self._scores(layer + 1, last + 1, signal)
        margins = self._margins_of(scores, slice(layer + 1, last + 1))
        if self._learning:
            for distance in range(last - layer):
                self._margins.setdefault(layer + 1 + distance, []).append((distance, margins[:, distance]))
        count = last - layer
        probability = _logistic(margins * self._slope[:count, None] + self._offset[:count, None])
        usable = self.usable[layer + 1 : last + 1]
        if not usable.all():
            probability[:, ~usable] = np.nan
        return probability

    @torch.no_grad()
    def ask(self, layer: int, residual: torch.Tensor) -> torch.Tensor | None:
        """Start on the device what `observe` needs of a layer's residual stream [B, H]; see `Predictor`.

        Returns:
            Scores [B, n, E], before biases: of the layer itself while it is checked, then of the coming ones; None
            where `observe` needs none.
        """
        last, scores = self._last_asked(layer), []
        if self._rows_to_check[layer]:
            scores.append(self._scores_on_device(layer, layer + 1, residual))
        if last > layer:
            scores.append(self._scores_on_device(layer + 1, last + 1, residual))
        return torch.cat(scores, 1) if scores else None

    def _last_asked(self, layer: int) -> int:
        """Return the last layer whose router is run at a layer; the layer itself where none is."""
        last = min(layer + self.reach, self.num_layers - 1)
        return last if layer % self._stride == 0 and self.usable[layer + 1 : last + 1].any() else layer

    def _scores(self, begin: int, end: int, signal: torch.Tensor) -> np.ndarray:
        """Score the experts of layers begin to end on a residual stream [B, H]: [B, end - begin, E]."""
        if self._arrays is not None:  # on the CPU numpy is faster than torch for one token
            hidden = signal.float().numpy()
            scores = hidden @ self._arrays[:, begin * self.num_experts : end * self.num_experts]
            scale = 1 / np.sqrt(np.einsum("bh,bh->b", hidden, hidden) / hidden.shape[1] + self._eps[begin])
            scores = scores.reshape(len(scores), end - begin, self.num_experts) * scale[:, None, None]
        else:
            scores = self._scores_on_device(begin, end, signal).cpu().numpy()
        return self._biased(scores, begin)

    def _scores_on_device(self, begin: int, end: int, signal: torch.Tensor) -> torch.Tensor:
        stream = signal.to(self._routers.device).float()
        stream = stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + self._eps[begin])
        scores = (stream.to(self._dtype) @ self._routers.narrow(0, begin, end - begin).flatten(0, 1).T).float()
        return scores.view(len(scores), end - begin, self.num_experts)

    def _biased(self, scores: np.ndarray, begin: int) -> np.ndarray:
        """Return scores [B, n, E] of the layers from `begin` on with their biases."""
        return scores if self._biases is None else scores + self._biases[begin : begin + scores.shape[1]]

    def _margins_of(self, scores: np.ndarray, layers: slice) -> np.ndarray:
        """Return scores [B, n, E] less the middle of the K-th and the next best, in units of their usual spread."""
        top_k = self._top_k
        if top_k >= self.num_experts:
            return np.full_like(scores, 10.0)
        ranked = np.partition(scores, (-top_k - 1, -top_k), axis=-1)
        margins = scores - (ranked[..., -top_k, None] + ranked[..., -top_k - 1, None]) * 0.5
        if self._learning:
            spread = np.sqrt((np.maximum(margins, _MIN_MARGIN) ** 2).mean((0, 2)))
            known = self._spread[layers] > 0
            self._spread[layers] = np.where(known, 0.95 * self._spread[layers] + 0.05 * spread, spread)
        return margins / (self._spread[layers, None] + 1e-6)

    def _check(self, layer: int, experts: np.ndarray, scores: np.ndarray) -> None:
        """Compare the folded router's scores [B, E] with the model's choice, on the first `_CHECKED_ROWS` rows."""
        experts = experts[: self._rows_to_check[layer]]
        best = np.argsort(-scores[: len(experts)], axis=1)[:, : experts.shape[1]]
        self._agreed[layer] += sum(len(np.intersect1d(a, b)) / len(a) for a, b in zip(best, experts, strict=True))
        self._rows_to_check[layer] -= len(experts)
        if not self._rows_to_check[layer]:
            self.usable[layer] &= self._agreed[layer] >= _MIN_AGREEMENT * _CHECKED_ROWS

    def _learn(self, layer: int, experts: np.ndarray) -> None:
        """Fit the curve of each distance to the router's choice."""
        said = self._margins.pop(layer, None)
        if not said:
            return
        distances = [distance for distance, _ in said]
        margins = np.stack([margins for _, margins in said])  # [n, B, E]
        if margins.shape[1] != len(experts) or np.isnan(margins).any():
            return
        margins = np.maximum(margins, _MIN_MARGIN)  # an expert that does not exist is infinitely far below
        chosen = np.zeros(margins.shape[1:], np.float32)
        inside = experts < self.num_experts
        chosen[np.nonzero(inside)[0], experts[inside]] = 1
        slope, offset = self._slope[distances, None, None], self._offset[distances, None, None]
        error = _logistic(margins * slope + offset) - chosen
        rate = _LEARNING_RATE * self.num_experts
        self._slope[distances] -= rate * (error * margins).mean((1, 2))
        self._offset[distances] -= rate * error.mean((1, 2))
        self._num_updates += 1


def _logistic(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(np.minimum(-values, 60)))
