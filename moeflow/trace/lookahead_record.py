"""Recording of a model's lookahead while the model runs: expert ids, likeliest first, as a trace holds them."""

import numpy as np
import torch

from moeflow.hf.passes.residual import ResidualTap
from moeflow.predictors.lookahead import Lookahead


class LookaheadRecord:
    """Asks a lookahead of its own at every layer of every pass, whichever predictor the runtime has.

    Args:
        lookahead: of this model.
        tap: the residual stream, a tap of its own: a residual is handed out once.
        num_ranks: M, ids kept of each layer.
        none: the id that stands for none.
    """

    def __init__(self, lookahead: Lookahead, tap: ResidualTap, num_ranks: int, none: int) -> None:
        self.lookahead = lookahead
        self.shape = (lookahead.reach, num_ranks)
        self._tap = tap
        self._none = none
        self._ids = np.empty((0, 0, 0, 0), np.int64)

    def begin_pass(self, num_tokens: int) -> None:
        """Begin a pass over so many tokens: nothing is predicted of it yet."""
        self._tap.listen(True)
        self.lookahead.step(np.empty(0, np.int64))
        self._ids = np.full((num_tokens, self.lookahead.num_layers, *self.shape), self._none)

    def observe(self, layer: int, top_k_index: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Ask about the layers after this one, whose router chose top_k_index [T, K] from hidden_states [T, H]."""
        residual = self._tap.residual(layer, hidden_states)
        said = self.lookahead.observe(layer, top_k_index.cpu().numpy(), None, residual)
        if said is None:
            return
        likeliest = np.argsort(-said, axis=2, kind="stable")[:, :, : self.shape[1]]
        known = ~np.isnan(said).all(axis=2, keepdims=True)
        self._ids[:, layer, : said.shape[1]] = np.where(known, likeliest, self._none)

    @property
    def ids(self) -> np.ndarray:
        """Predictions of this pass: [T, L, D, M]."""
        return self._ids

    def close(self) -> None:
        """Take the hooks off the model."""
        self._tap.close()
