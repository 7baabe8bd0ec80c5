"""Groups of an engine's step: splits its pieces into passes by the token scheduler, and records their routes.

Knows pieces and the token scheduler. Knows nothing of slots or sampling. Groups are of sequences that decode; pieces of
prompts go with the last group.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from moeflow.engine.regrouping.token_scheduler import SchedulerStats, TokenScheduler
from moeflow.engine.sequence import Piece
from moeflow.errors import ConfigError
from moeflow.hf import experts_interface

if TYPE_CHECKING:
    from moeflow.offload.runtime import ExpertRuntime
from moeflow.hf.passes.forward import ForwardPass


class PassRoutes:
    """Observer of one pass that keeps the routes its routers chose.

    Args:
        num_layers: L.
        num_experts: E, the largest number of experts in a layer.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._num_layers, self._num_experts = num_layers, num_experts
        self._chosen: dict[int, np.ndarray] = {}

    def begin_pass(self, begun: ForwardPass) -> None:
        """Nothing is kept of a pass but its routes."""

    def observe(
        self,
        layer: int,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor | None = None,
        hidden_states: torch.Tensor | None = None,
    ) -> None:
        """Take in a layer's [tokens, K] choices."""
        self._chosen[layer] = top_k_index.numpy(force=True).copy()

    def close(self) -> None:
        """Nothing is held."""

    def take(self, num_tokens: int) -> np.ndarray:
        """Return the routes of the pass's tokens, [tokens, L, K] with E for none, and forget them."""
        top_k = max((chosen.shape[1] for chosen in self._chosen.values()), default=0)
        taken = np.full((num_tokens, self._num_layers, top_k), self._num_experts, np.int64)
        for layer, chosen in self._chosen.items():
            if len(chosen) == num_tokens:
                taken[:, layer, : chosen.shape[1]] = np.minimum(chosen, self._num_experts)
        self._chosen.clear()
        return taken


class StepGroups:
    """Cuts an engine's steps into passes.

    Args:
        model: of `load_moe`.
        group_size: most sequences that decode in one pass.
        regrouping: whether groups are chosen by routes; else by arrival.
    """

    def __init__(self, model: PreTrainedModel, group_size: int, *, regrouping: bool = True) -> None:
        if getattr(model, "moeflow", None) is None:
            raise ConfigError("group_size is for models of load_moe, whose experts are fetched. Leave it out.")
        self._runtime = cast("ExpertRuntime", model.moeflow)  # transformers types it as a module
        counts = self._runtime.experts_per_layer
        self._shape = len(counts), max(counts)
        top_k = experts_interface.num_experts_per_tok(model)
        self._scheduler = TokenScheduler(*self._shape, top_k, group_size, regrouping=regrouping)
        self._routes = PassRoutes(*self._shape)
        self._decoding: list[str] = []
        self._true: dict[str, np.ndarray] = {}  # [L, K] of those that decoded in this step

    @property
    def stats(self) -> SchedulerStats:
        """Counters of regrouping."""
        return self._scheduler.stats

    def split(self, pieces: list[Piece]) -> Iterator[list[Piece]]:
        """Yield the pieces of each pass of a step."""
        decoding = [piece for piece in pieces if piece.sequence.decoding]
        prompts = [piece for piece in pieces if not piece.sequence.decoding]
        self._decoding, self._true = [piece.sequence.id for piece in decoding], {}
        fed = [piece.tokens[0] for piece in decoding]
        places = self._scheduler.split(self._decoding, fed, self._runtime.cache.present(*self._shape))
        for number, group in enumerate(places or [[]]):
            last = number == max(len(places) - 1, 0)
            if last and len(places) > 1:
                chosen: list[int | None] = [piece.sequence.token_ids[-1] for piece in decoding]
                for place in group:
                    chosen[place] = None  # until this pass has run
                self._scheduler.plan_ahead(self._decoding, chosen)
            passed = [decoding[place] for place in group] + (prompts if last else [])
            if passed:
                yield passed

    @contextmanager
    def watching(self, pieces: list[Piece]) -> Iterator[None]:
        """Record the routes of a pass over pieces, where later groups will depend on them."""
        if not self._scheduler.wants_routes:
            yield
            return
        self._runtime.observers.append(self._routes)
        try:
            yield
        finally:
            self._runtime.observers.remove(self._routes)
        chosen, begin = self._routes.take(sum(len(piece.tokens) for piece in pieces)), 0
        for piece in pieces:
            own = chosen[begin : begin + len(piece.tokens)]
            begin += len(piece.tokens)
            self._scheduler.observe(piece.sequence.id, piece.tokens, own)
            self._true[piece.sequence.id] = own[-1]

    def finish(self, step_s: float) -> None:
        """Judge the step, where every sequence that was to decode did."""
        if self._decoding and all(id in self._true for id in self._decoding):
            self._scheduler.finish(np.stack([self._true[id] for id in self._decoding]), step_s)

    def forget(self, id: str) -> None:
        """Drop a sequence that has ended."""
        self._scheduler.forget(id)

    def close(self) -> None:
        """End the thread that plans."""
        self._scheduler.close()
