"""The routing path predictor, live: all layers of a step from token ids alone, before its first MoE layer runs."""

import numpy as np
import torch

from moeflow.predictors.path_net import PathNet


class PathPredictor:
    """Predicts by a PathNet; it never looks at routes.

    Args:
        net: trained.
    """

    name = "path"
    signal = "none"
    reach = 0

    def __init__(self, net: PathNet):
        self.net = net.cpu().eval().requires_grad_(False)
        self.num_layers, self.num_experts = net.shape.num_layers, net.shape.num_experts
        self.begin(1)

    def begin(self, num_sequences: int) -> None:
        self._caches = [{} for _ in range(num_sequences)]  # one each: prompts differ in length

    @torch.inference_mode()
    def prefill(self, token_ids: np.ndarray, experts: np.ndarray, weights: np.ndarray | None) -> None:
        valid = experts[:, :, 0, 0] < self.num_experts
        for b, cache in enumerate(self._caches):
            fed = token_ids[b][valid[b]]
            if len(fed):
                self.net(torch.from_numpy(fed.astype(np.int64))[None], cache)

    @torch.inference_mode()
    def step(self, token_ids: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(token_ids.astype(np.int64))[:, None]
        logits = [self.net(ids[b : b + 1], cache)[:, 0] for b, cache in enumerate(self._caches)]
        return torch.sigmoid(torch.cat(logits)).numpy()

    def observe(
        self, layer: int, experts: np.ndarray, weights: np.ndarray | None, signal: np.ndarray | None = None
    ) -> None:
        return None

    def later(self) -> None:
        return None
