"""Model runner: packs pieces of many sequences into one forward pass, and returns the logits of each.

Knows tensors and slots. Knows nothing of requests.
"""

import hashlib
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from moeflow.engine.kv_cache.budget import kv_budget, most_kept
from moeflow.engine.kv_cache.memory import KeyValueMemory
from moeflow.engine.kv_cache.slots import SlotRows
from moeflow.engine.sequence import Piece, Sequence
from moeflow.engine.varlen_attention import Segment, VarlenCache
from moeflow.errors import ExpertReadError
from moeflow.fit.contract import Contract
from moeflow.hf.fingerprint import weights_fingerprint
from moeflow.hf.passes import forward
from moeflow.hf.passes.step_rows import StepRows
from moeflow.memory_size import MemorySize
from moeflow.turns import Turns

_PASS_ERRORS = (ExpertReadError, OSError, RuntimeError)


class Computed(NamedTuple):
    """Result of a pass for one piece.

    Args:
        piece: what was to be computed.
        logits: [rows, V] of its last token where the piece samples, of all its tokens where its prompt is scored; None
            for none of these.
        error: the reason where it could not be computed.
    """

    piece: Piece
    logits: torch.Tensor | None
    error: str | None = None


class ModelRunner:
    """Runs pieces of sequences on a model and keeps their keys and values.

    Args:
        model: whose passes these are.
        kv_memory: most bytes of keys and values; "auto": what was kept for them when the model was loaded.
        max_positions: most positions of all sequences together; None for no limit.
        watching: stands around each pass, called with its pieces.
        most_new: most tokens of one sequence in one pass; None for no limit, and for windows that do not move.

    Attributes:
        memory: where keys and values lie.
        num_retries: passes that failed, whose pieces then ran one by one.

    Raises:
        ConfigError: kv_memory is no size.
        UnsupportedModelError: the model attends in a way of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kv_memory: MemorySize,
        max_positions: int | None = None,
        watching: Callable[[list[Piece]], AbstractContextManager] = nullcontext,
        most_new: int | None = None,
    ) -> None:
        self._model = model
        self._watching = watching
        runtime = getattr(model, "moeflow", None)
        self._turns = getattr(runtime, "turns", None) or Turns()
        self._cache = VarlenCache()
        self._turns.run(self._cache.learn, model)
        self.memory = KeyValueMemory(
            self._cache.shapes,
            kv_budget(kv_memory, model),
            max_positions,
            most_kept_bytes=most_kept(kv_memory, model),
            most_new=most_new,
        )
        if isinstance(contract := getattr(runtime, "plan", None), Contract):
            behind = weakref.ref(self.memory)
            contract.watch("key_values", lambda: getattr(behind(), "peak_bytes", None))
        self.num_retries = 0

    def sequence(self, id: str, prompt_ids: list[int], max_new_tokens: int, priority: int = 0) -> Sequence:
        """Make a sequence that knows how this model scales by the length."""
        rotaries = self._cache.rotaries
        return Sequence(id, prompt_ids, max_new_tokens, rotaries.scaling_of, rotaries.restart, priority)

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that differ where the model would compute other keys and values.

        They are made of its weights in memory, of how its experts are stored, and of size and date of their files.
        """
        store = getattr(getattr(self._model, "moeflow", None), "store", None)
        experts = (
            [] if store is None else [*(layer.layout for layer in store.layers), *(one[2:] for one in store.stamps)]
        )
        return hashlib.sha256(f"{weights_fingerprint(self._model)} {experts}".encode()).hexdigest()[:16]

    def run(self, pieces: list[Piece]) -> list[Computed]:
        """Compute the pieces in one pass; where it fails, each piece alone, so that only the broken ones fail.

        Each piece also runs alone where the model takes one length for a whole pass.
        """
        if len(pieces) == 1 or self._cache.shares_passes:
            try:
                return self._forward(pieces)
            except _PASS_ERRORS:
                self.num_retries += 1
        computed = []
        for piece in pieces:
            try:
                computed += self._forward([piece])
            except _PASS_ERRORS as error:
                computed.append(Computed(piece, None, f"{type(error).__name__}: {error}".partition("\n")[0]))
        return computed

    def _forward(self, pieces: list[Piece]) -> list[Computed]:
        segments: list[Segment] = []
        tokens: list[int] = []
        positions: list[int] = []
        keep: list[int] = []
        rows: list[int] = []  # of each piece
        for sequence, new, samples in pieces:
            segment = Segment(self.memory[sequence.id], sequence.num_computed, len(new), sequence.call_length)
            segments.append(segment)
            tokens += new
            positions += range(segment.start, segment.end)
            rows.append(len(new) if sequence.scored and not sequence.token_ids else int(samples))
            keep += range(len(tokens) - rows[-1], len(tokens))
        input_ids, position_ids, places = (
            torch.tensor(values, dtype=torch.long, device=self._model.device)
            for values in (tokens, positions, keep or [len(tokens) - 1])
        )

        def run_pass() -> torch.Tensor:
            with torch.no_grad(), self._watching(pieces):
                logits = self._step(segments, input_ids, position_ids)
                if logits is not None:
                    return logits[places]
                with self._cache.running(self._model, segments):
                    return forward.packed_forward(self._model, input_ids[None], position_ids[None], self._cache, places)

        logits = self._turns.run(run_pass)[: sum(rows)].split(rows)
        return [Computed(piece, own if len(own) else None) for piece, own in zip(pieces, logits, strict=True)]

    def _step(
        self, segments: list[Segment], input_ids: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor | None:
        """Run a pass as a native step and return the logits [S, V]; None where the model must run it itself."""
        step = getattr(getattr(self._model, "moeflow", None), "step", None)
        slots = [segment.slot for segment in segments if segment.slot is not None]
        starts = [segment.start for segment in segments if segment.num_new == 1 and segment.start]
        if step is None or len(starts) < len(segments) or self._cache.rotaries.depend_on_length:
            return None
        rows = StepRows(SlotRows(slots, starts), input_ids[:, None], position_ids)
        tokens = rows.input_ids if self._cache.goes_on(segments) else None
        logits = step.step(rows, forward.ForwardPass(len(slots), 1, True, tokens))
        if logits is None:
            return None
        self._cache.follow(segments)
        return logits[:, 0]
