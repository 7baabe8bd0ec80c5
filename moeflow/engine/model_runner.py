"""Model runner: packs pieces of many sequences into one forward pass, and returns the logits of each.

Knows tensors and slots. Knows nothing of requests.
"""

import hashlib
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from moeflow.engine.kv_cache.budget import kv_budget, most_kept, share_of
from moeflow.engine.kv_cache.kv_format import format_named
from moeflow.engine.kv_cache.memory import KeyValueMemory
from moeflow.engine.kv_cache.policies.choosing import policy_stats
from moeflow.engine.kv_cache.policies.protocol import KeyValuePolicy
from moeflow.engine.kv_cache.slot_rows import SlotRows
from moeflow.engine.kv_cache.slots import KeyValueSlot
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
        logits: [rows, V] of its last token where the piece samples and of the draft behind it, of all its tokens where
            its prompt is scored; None for none of these.
        error: the reason where it could not be computed.
    """

    piece: Piece
    logits: torch.Tensor | None
    error: str | None = None


class RouteWatcher(Protocol):
    """What is shown the experts that tokens took.

    Attributes:
        wanted: whether it wants those of the pass under way.
    """

    wanted: bool

    def watching(self, pieces: list[Piece]) -> AbstractContextManager:
        """Stand around a pass of the model's own code over pieces."""
        ...

    def saw(self, pieces: list[Piece], routes: np.ndarray) -> None:
        """Take in what the tokens of pieces and of their drafts took, [tokens, L, K], behind a native step."""
        ...


class HiddenWatcher(Protocol):
    """What is shown the hidden states that the head makes logits of. It raises nothing."""

    def saw_hidden(self, pieces: list[Piece], hidden: torch.Tensor | None) -> None:
        """Take in those of the tokens of pieces and of their drafts, [tokens, H]; None where a native step has none."""
        ...


class ModelRunner:
    """Runs pieces of sequences on a model and keeps their keys and values.

    Args:
        model: whose passes these are.
        kv_memory: most bytes of keys and values; "auto": what was kept for them when the model was loaded.
        max_positions: most positions of all sequences together; None for no limit.
        watching: stands around each pass, called with its pieces.
        most_new: most tokens of one sequence in one pass; None for no limit, and for windows that do not move.
        kv_format: in which keys and values are kept: "auto" (as they are), "int8" or "int4".
        policy: which positions queries see and sequences forget; None for none. With one, no native step runs.

    Attributes:
        memory: where keys and values lie.
        num_retries: passes that failed, whose pieces then ran one by one.
        was_native: whether the last pass was a native step.
        packed_drafts: whether drafts are computed where no native step runs as well; logits then have other last bits
            than those of single tokens.
        routes: what is shown the experts that tokens took; None for nothing.
        hidden: what is shown last hidden states; None for nothing.

    Raises:
        ConfigError: kv_memory is no size, kv_format unknown, or the model keeps what it or the policy cannot hold.
        UnsupportedModelError: the model attends in a way of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kv_memory: MemorySize,
        max_positions: int | None = None,
        watching: Callable[[list[Piece]], AbstractContextManager] = nullcontext,
        most_new: int | None = None,
        kv_format: str = "auto",
        policy: KeyValuePolicy | None = None,
    ) -> None:
        self._model, self._policy = model, policy
        self.packed_drafts = False
        self.was_native = False
        self.routes: RouteWatcher | None = None
        self.hidden: HiddenWatcher | None = None
        self._watching = watching
        runtime = getattr(model, "moeflow", None)
        self._turns = getattr(runtime, "turns", None) or Turns()
        self._cache = VarlenCache()
        form = format_named(kv_format)
        self._kv_format = kv_format
        self._turns.run(self._cache.learn, model)
        shapes = self._cache.shapes if form is None else self._cache.shapes_in(form)
        share = share_of(model)
        self.memory = KeyValueMemory(
            shapes if policy is None else self._cache.obey(policy, shapes),
            kv_budget(kv_memory, model),
            max_positions if share is None else None,  # a share takes no bytes that it does not use
            most_kept_bytes=most_kept(kv_memory, model),
            most_new=most_new,
            share=share,
            policy=policy,
        )
        if isinstance(contract := getattr(runtime, "plan", None), Contract):
            behind = weakref.ref(self.memory)
            contract.watch("key_values", lambda: getattr(behind(), "peak_bytes", None))
        self.num_retries = 0

    def stats(self) -> dict[str, Any]:
        """Return the passes that were retried, and how keys and values are kept."""
        return {"retries": self.num_retries, "kv_format": self._kv_format, "kv_policy": policy_stats(self._policy)}

    def sequence(self, id: str, prompt_ids: list[int], max_new_tokens: int, priority: int = 0) -> Sequence:
        """Make a sequence that knows how this model scales by the length."""
        rotaries = self._cache.rotaries
        return Sequence(id, prompt_ids, max_new_tokens, rotaries.scaling_of, rotaries.restart, priority)

    @property
    def policy_name(self) -> str | None:
        """The policy by which queries see and sequences forget; None for none."""
        return None if self._policy is None else self._policy.name

    @property
    def scales_by_length(self) -> bool:
        """Whether positions of a sequence are scaled by its length, so that a token has its length's pass."""
        return self._cache.rotaries.depend_on_length

    def room_behind(self, sequence: Sequence) -> int:
        """Return how many positions a running sequence's slot has room for behind all its tokens."""
        slot = self.memory[sequence.id]
        return max(0, min(slot.num_positions, slot.in_window[1]) - sequence.length)

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that differ where the model would compute other keys and values.

        They are made of its weights in memory, of how its experts are stored, of size and date of their files, of the
        format in which keys and values are kept, and of their policy.
        """
        store = getattr(getattr(self._model, "moeflow", None), "store", None)
        experts = (
            [] if store is None else [*(layer.layout for layer in store.layers), *(one[2:] for one in store.stamps)]
        )
        kept = "" if self._kv_format == "auto" else f" {self._kv_format}"
        kept += "" if self._policy is None else f" {self._policy.described()}"
        return hashlib.sha256(f"{weights_fingerprint(self._model)} {experts}{kept}".encode()).hexdigest()[:16]

    def run(self, pieces: list[Piece]) -> list[Computed]:
        """Compute the pieces in one pass; where it fails, each piece alone, so that only the broken ones fail.

        Each piece also runs alone where the model takes one length for a whole pass. Drafts are left out where they
        could change anything: in a pass that runs again, and outside of native steps.
        """
        if len(pieces) == 1 or self._cache.shares_passes:
            try:
                return self._forward(pieces)
            except _PASS_ERRORS:
                self.num_retries += 1
        computed = []
        for piece in _undrafted(pieces):
            try:
                computed += self._forward([piece])
            except _PASS_ERRORS as error:
                computed.append(Computed(piece, None, f"{type(error).__name__}: {error}".partition("\n")[0]))
        return computed

    @property
    def _decoding(self) -> Any:
        """What runs native steps; None for nothing."""
        return getattr(getattr(self._model, "moeflow", None), "step", None)

    def _forward(self, pieces: list[Piece]) -> list[Computed]:
        segments: list[Segment] = []
        tokens: list[int] = []
        positions: list[int] = []
        keep: list[int] = []
        rows: list[int] = []  # of each piece
        for sequence, own, samples, draft in pieces:
            new = [*own, *draft]
            assert not draft or len(draft) <= self.room_behind(sequence), f"{sequence.id} has no room for its draft"
            segment = Segment(self.memory[sequence.id], sequence.num_computed, len(new), sequence.call_length)
            segments.append(segment)
            tokens += new
            positions += range(segment.start, segment.end)
            rows.append(len(new) if sequence.scored and not sequence.token_ids else int(samples) + len(draft))
            keep += range(len(tokens) - rows[-1], len(tokens))
        input_ids, position_ids, places = (
            torch.tensor(values, dtype=torch.long, device=self._model.device)
            for values in (tokens, positions, keep or [len(tokens) - 1])
        )

        def run_pass() -> torch.Tensor | None:
            with torch.no_grad(), self._watching(pieces):
                logits = None
                if all(len(piece.tokens) == 1 and piece.sequence.num_computed for piece in pieces):
                    logits = self._step(segments, input_ids, position_ids)
                self.was_native = logits is not None
                watcher = self.routes if self.routes is not None and self.routes.wanted else None
                if logits is not None:
                    if watcher is not None:
                        watcher.saw(pieces, self._decoding.routes())
                    if self.hidden is not None:
                        self.hidden.saw_hidden(pieces, self._decoding.last_hidden())
                    return logits if len(keep) == len(tokens) else logits[places]
                if not self.packed_drafts and any(piece.draft for piece in pieces):
                    return None
                watching = nullcontext() if watcher is None else watcher.watching(pieces)
                shown: AbstractContextManager[list[torch.Tensor]] = nullcontext([])
                if self.hidden is not None:
                    shown = forward.last_hidden_states(self._model)
                with self._cache.running(self._model, segments), watching, shown as hidden:
                    made = forward.packed_forward(self._model, input_ids[None], position_ids[None], self._cache, places)
                if self.hidden is not None:
                    self.hidden.saw_hidden(pieces, hidden[0][0])
                return made

        computed = self._turns.run(run_pass)
        if computed is None:
            return self._forward(_undrafted(pieces))
        logits = computed[: sum(rows)].split(rows)
        return [Computed(piece, own if len(own) else None) for piece, own in zip(pieces, logits, strict=True)]

    def _step(
        self, segments: list[Segment], input_ids: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor | None:
        """Run a pass as a native step and return the logits [N, V]; None where the model must run it itself.

        A step keeps the keys and values of all rows before any attends, and each row attends to the positions before
        its own. So the tokens of a draft are rows that share a slot.
        """
        step = self._decoding
        if step is None or self._policy is not None or self._cache.rotaries.depend_on_length:
            return None
        slots: list[KeyValueSlot] = []
        starts: list[int] = []
        for segment in segments:
            assert segment.slot is not None, "a sequence without a slot"
            slots += [segment.slot] * segment.num_new
            starts += range(segment.start, segment.end)
        rows = StepRows(SlotRows(slots, starts), input_ids[:, None], position_ids)
        tokens = rows.input_ids if len(slots) == len(segments) and self._cache.goes_on(segments) else None
        logits = step.step(rows, forward.ForwardPass(len(slots), 1, True, tokens))
        if logits is None:
            return None
        self._cache.follow(segments)
        return logits[:, 0]


def _undrafted(pieces: list[Piece]) -> list[Piece]:
    """Return pieces without their drafts."""
    return [piece._replace(draft=()) for piece in pieces]
