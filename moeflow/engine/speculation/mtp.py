"""Multi-token prediction: layers that the model was trained with say the tokens behind the next one.

Sources: Gloeckle et al. 2024; DeepSeek-AI 2024 (DeepSeek-V3, section 2.2).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from moeflow.engine.sequence import Piece, Sequence
from moeflow.engine.speculation.drafts import NO_DRAFT, Draft
from moeflow.hf.loaded.mtp_layers import refused_mtp, why_no_mtp

if TYPE_CHECKING:
    from moeflow.hf.loaded.mtp_layers import MtpLayers
    from moeflow.offload.runtime import ExpertRuntime

_MOST_SEQUENCES = 8  # whose keys and values are kept: with more, no step has room for drafts
_MOST_PENDING = 256  # hidden states of a sequence that wait for the next draft
_LIKELY = 0.5  # of all tokens of a draft together, down to which the last layer is asked once more


@dataclass
class _Seen:
    """What is known of one sequence, whose positions from `begin` on passed by without a gap.

    Args:
        begin: its first position.
        cache: keys and values of the layers, of `num_kept` positions each, and of drafted ones behind.
        num_kept: positions that will not be computed again: their tokens are the sequence's own in all layers.
        pending: [P, H], the model's hidden states of the positions behind these.
    """

    begin: int
    cache: Any
    pending: torch.Tensor
    num_kept: int = field(default=0)

    @property
    def next(self) -> int:
        """The position of the first pending hidden state."""
        return self.begin + self.num_kept


class MtpSource:
    """Proposes what a model's layers of multi-token prediction say, greedily, one token for each layer.

    Where a draft is likely enough the last layer says more tokens, each behind what it said itself.

    Args:
        model: of `load_moe`, loaded with such layers.

    Raises:
        ConfigError: it has none.
    """

    name = "mtp"
    costs = True

    def __init__(self, model: PreTrainedModel) -> None:
        found: MtpLayers | None = getattr(model, "_moeflow_mtp", None)
        if found is None:
            why = 'the model was loaded without them: give load_moe speculation={"sources": ("mtp",)}'
            raise refused_mtp(why_no_mtp(model) or why)
        self._layers = found
        self._runtime: ExpertRuntime = model.moeflow  # type: ignore[assignment]  # transformers types it as a module
        own = [module._moeflow.layer for _, module in found.experts()]
        self._idle = np.array(own), np.empty((len(own), 0), np.int64)
        self._seen: dict[str, _Seen] = {}  # latest last
        self._asked = False  # whether the layers ran since the last pass
        self._failure: Exception | None = None

    def saw_hidden(self, pieces: list[Piece], hidden: torch.Tensor | None) -> None:
        """Keep the hidden states of a pass, and compute the layers' keys and values of prompts."""
        if self._failure is not None:
            return
        try:
            if hidden is None:
                raise ValueError("native steps tell no hidden states")
            if not self._asked:  # so that experts of which nothing is asked grow old
                with self._runtime.holding():
                    self._runtime.cache.touch_layers(*self._idle)
            self._asked = False
            sizes = [len(one.tokens) + len(one.draft) for one in pieces]
            for piece, rows in zip(pieces, hidden.split(sizes), strict=True):
                seen = self._continued(piece.sequence, rows)
                if len(piece.tokens) > 1 or len(seen.pending) >= _MOST_PENDING:
                    self._settle(seen, piece.sequence.tokens_from(seen.next))
        except Exception as error:  # told by the next proposal, so that the pass goes on
            self._failure = error
            self._seen.clear()

    def propose(self, sequence: Sequence, most: int) -> Draft:
        """Return what the layers say behind a sequence.

        Raises:
            Exception: what came in the way, now or since the last proposal.
        """
        if self._failure is not None:
            raise self._failure
        seen = self._seen.get(sequence.id)
        if seen is None or not seen.next < sequence.num_computed <= seen.next + len(seen.pending):
            return NO_DRAFT
        ids = sequence.tokens_from(seen.next + 1)
        try:
            return self._runtime.turns.run(self._draft, seen, sequence.num_computed, ids, most)
        except Exception as error:
            self._failure = error
            self._seen.clear()
            raise

    def saw(self, tokens: list[int], logits: torch.Tensor) -> None:
        """Nothing: hidden states say all."""

    def forget(self, id: str) -> None:
        """Drop what is known of a sequence."""
        self._seen.pop(id, None)

    def _continued(self, sequence: Sequence, rows: torch.Tensor) -> _Seen:
        """Append the rows of a pass to what is known of a sequence, or begin anew where they do not go on there."""
        start, seen = sequence.num_computed, self._seen.pop(sequence.id, None)
        if seen is None or not seen.next <= start <= seen.next + len(seen.pending):
            seen = _Seen(start, self._layers.new_cache(), rows[:0])
        seen.pending = torch.cat([seen.pending[: start - seen.next], rows])  # what is cut off was of rejected tokens
        self._seen[sequence.id] = seen
        while len(self._seen) > _MOST_SEQUENCES:
            del self._seen[next(iter(self._seen))]
        return seen

    def _settle(self, seen: _Seen, tokens: list[int]) -> None:
        """Compute the keys and values of pending positions for which every layer's token is there.

        Args:
            seen: of a sequence.
            tokens: of the sequence, from the first pending position on.
        """
        count = min(len(seen.pending), len(tokens) - self._layers.num_layers)
        if count < 1:
            return
        hidden = seen.pending[:count]
        self._layers.cut(seen.cache, seen.num_kept)
        with self._runtime.unwatched(counts=True):
            for layer in range(self._layers.num_layers):
                ids = tokens[layer + 1 : layer + 1 + count]
                hidden = self._layers.run(layer, hidden, ids, seen.next + layer + 1, seen.cache)
        seen.num_kept += count
        seen.pending = seen.pending[count:]

    def _draft(self, seen: _Seen, end: int, ids: list[int], most: int) -> Draft:
        """Run the layers over what is pending.

        Args:
            seen: of the sequence.
            end: its computed positions; pending rows from there on are of rejected tokens.
            ids: its tokens behind the first pending position, one for each pending row.
            most: of the draft.
        """
        layers, first = self._layers, seen.next
        hidden = seen.pending = seen.pending[: end - first]
        layers.cut(seen.cache, seen.num_kept)  # what stands behind is of drafts, or of a pass that was interrupted
        tokens: list[int] = []
        probabilities: list[float] = []
        likely = 1.0
        with self._runtime.unwatched(counts=True):
            while len(tokens) < layers.num_layers or (len(tokens) < most and likely >= _LIKELY):
                place = len(tokens)
                layer = min(place, layers.num_layers - 1)
                if place >= layers.num_layers:  # it goes on from its own hidden state
                    hidden, ids = hidden[-1:], ids[-1:]
                hidden = layers.run(layer, hidden, ids, end + place + 1 - len(ids), seen.cache)
                token, probability = layers.likeliest(hidden[-1])
                tokens.append(token)
                probabilities.append(probability)
                likely *= probability
                ids = [*ids[1:], token]
        self._asked = True
        seen.num_kept += max(0, len(seen.pending) - layers.num_layers + 1)
        seen.pending = seen.pending[seen.next - first :]
        return Draft(tuple(tokens[:most]), tuple(probabilities[:most]))
