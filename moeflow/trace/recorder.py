"""Records the routes of a running model, token by token, into a trace file.

Knows passes and routes, and changes neither. Knows nothing of tiers or budgets.
"""

import logging
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeflow.errors import ConfigError, ForkedProcessError, TraceError
from moeflow.fork import tell_of_forks
from moeflow.hf import experts_interface
from moeflow.hf.fingerprint import model_fingerprint
from moeflow.hf.passes.forward import ForwardPass
from moeflow.hf.passes.residual import ResidualTap, build_lookahead
from moeflow.trace.buffered_rows import BufferedRows
from moeflow.trace.format import DECODE, PREFILL, TraceFormat
from moeflow.trace.lookahead_record import LookaheadRecord
from moeflow.trace.writer import TraceWriter

_log = logging.getLogger(__name__)


class TraceRecorder:
    """Writes the routes of every pass that runs through all MoE layers; tokens of other passes are dropped.

    A pass that continues no key-value cache starts new sequences. A later pass goes on with the sequences of its
    cache. Positions that the attention mask hides, and the padding a batch's ended sequences are fed, are left out.

    Args:
        path: the trace; appended to where it exists.
        format: of the rows.
        padding: token ids that stand for nothing when a batch decodes.
        lookahead: fills the rows' lookahead, where the format has it.

    Raises:
        TraceError: the file is of another model, damaged, or cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        format: TraceFormat,
        *,
        padding: frozenset[int] = frozenset(),
        lookahead: LookaheadRecord | None = None,
    ) -> None:
        self.path = Path(path)
        self.dropped_tokens = 0  # of passes that did not run through every layer once
        self._format = format
        self._padding = sorted(padding)
        self._lookahead = lookahead
        self._num_experts = np.array(format.experts_per_layer)[:, None, None]
        rows = BufferedRows(TraceWriter(path, format, append=True))
        self._rows = rows
        self._next_sequence = rows.writer.next_sequence
        self._sequences = np.empty(0, np.uint32)  # [B] of the latest pass
        self._of_cache: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._pass: _Pass | None = None
        self._index = self._weights = torch.empty(0, 0, 0)  # [L, T, K], routes of the pass under way
        self._of_layer: list[tuple[torch.Tensor, torch.Tensor]] = []  # their views [T, K]
        self._close = weakref.finalize(self, rows.close)
        self._forked = False
        tell_of_forks(self)

    @property
    def num_tokens(self) -> int:
        """Tokens recorded so far, those in the file from before included."""
        return self._rows.num_rows

    def after_fork(self) -> None:
        """Let go of the file in the child of a fork, and refuse passes from now on: the parent goes on writing."""
        if self._close.detach() is not None:
            self._forked, self._pass = True, None
            self._rows.writer.after_fork()

    def begin_pass(self, begun: ForwardPass) -> None:
        """Hear that a pass over new tokens begins; the pass before must have ended or is dropped.

        Raises:
            ForkedProcessError: this process is a fork of the one that writes the trace.
        """
        if self._forked:
            raise ForkedProcessError(
                f"the routes of this model go to {self.path}, which the process that forked this one writes. Load the "
                "model in this process, without trace= or with another file."
            )
        if not self._close.alive:
            return
        self._drop_pass()
        if not begun.continues:
            self._rows.flush()
        self._choose_sequences(begun.num_sequences, begun.continues, begun.cache)
        mask = begun.attention_mask
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[0] != begun.num_sequences:
            mask = None  # masks of other ranks hide nothing
        phase = DECODE if begun.continues and begun.num_positions == 1 else PREFILL
        self._pass = _Pass(begun.token_ids, mask, self._sequences, begun.num_positions, phase)
        if self._lookahead is not None:
            self._lookahead.begin_pass(self._pass.num_tokens)

    def observe(
        self,
        layer: int,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        hidden_states: torch.Tensor | None = None,
    ) -> None:
        """Take in the choice of a layer's router, sequence by sequence.

        Args:
            layer: number among the MoE layers.
            top_k_index: [T, K], expert numbers.
            top_k_weights: [T, K].
            hidden_states: [T, H], the router's input; only a lookahead needs it.
        """
        current = self._pass
        if current is None:
            return
        num_tokens, top_k = top_k_index.shape
        if layer in current.seen or num_tokens != current.num_tokens:
            self._drop_pass()
            return
        if top_k > self._format.top_k:
            raise TraceError(
                f"layer {layer} routes a token to {top_k} experts, and a row of {self.path} has room for "
                f"{self._format.top_k}. Load the model without trace=."
            )
        if not current.seen:
            self._make_room(num_tokens, top_k_index.device)
        index, weights = self._of_layer[layer]
        # Copied at once: a compiled graph uses the memory of its tensors again.
        if top_k == self._format.top_k:
            index.copy_(top_k_index)
            weights.copy_(top_k_weights)
        else:
            index[:, :top_k], weights[:, :top_k] = top_k_index, top_k_weights
            index[:, top_k:] = self._format.none
        if self._lookahead is not None:
            assert hidden_states is not None, "a lookahead asks about hidden states"
            self._lookahead.observe(layer, top_k_index, hidden_states)
        current.seen.add(layer)
        if len(current.seen) == self._format.num_layers:
            self._pass = None
            self._record(current)

    def begin_recording(self, name: str, num_prompts: int) -> int:
        """Begin a recording of prompts; return how many are done: see `TraceWriter.begin_recording`."""
        done = self._rows.writer.begin_recording(name, num_prompts)
        self._next_sequence = self._rows.writer.next_sequence
        return done

    def end_prompt(self) -> None:
        """Write the tokens recorded so far and note that a prompt of the recording is done.

        Raises:
            TraceError: the file cannot be written.
        """
        self._rows.end_prompt(self._next_sequence)

    def close(self) -> None:
        """Write the rows that are left and close the file; later passes are not recorded.

        Raises:
            TraceError: the disk is full or failed; the file is closed all the same.
        """
        if self._lookahead is not None:
            self._lookahead.close()
        self._drop_pass()
        if self._close.alive and self.dropped_tokens:
            _log.warning(
                "%d tokens are not in %s: their passes did not run through each MoE layer once.",
                self.dropped_tokens,
                self.path,
            )
        if self._close.alive:
            self._rows.close()
            self._close.detach()  # not before: after an interrupt the next call closes the file

    def _drop_pass(self) -> None:
        if self._pass is not None:
            self.dropped_tokens += self._pass.num_tokens
            self._pass = None

    def _choose_sequences(self, num_sequences: int, continues: bool, cache: Any) -> None:
        known = self._of_cache.get(cache, self._sequences) if continues and _has_weakref(cache) else self._sequences
        if not continues or len(known) != num_sequences:
            known = np.arange(self._next_sequence, self._next_sequence + num_sequences, dtype=np.uint32)
            self._next_sequence += num_sequences
        self._sequences = known
        if _has_weakref(cache):
            self._of_cache[cache] = known

    def _make_room(self, num_tokens: int, device: torch.device) -> None:
        """Allocate memory for the routes of a pass over so many tokens; the passes of a decode share it."""
        room = self._index
        if room.shape[1] != num_tokens or room.device != device:
            shape = (self._format.num_layers, num_tokens, self._format.top_k)
            self._index = torch.empty(shape, dtype=torch.int32, device=device)
            self._weights = torch.empty(shape, dtype=torch.float32, device=device)
            self._of_layer = list(zip(self._index, self._weights, strict=True))

    def _record(self, current: "_Pass") -> None:
        """Turn a complete pass into rows: padding out, ranks by falling weight."""
        num_tokens, none = current.num_tokens, self._format.none
        experts, weights = self._index.cpu().numpy(), self._weights.cpu().numpy()
        absent = experts >= self._num_experts
        order = np.argsort(np.where(absent, np.inf, -weights), axis=2, kind="stable")
        experts = np.take_along_axis(np.where(absent, none, experts), order, 2)
        weights = np.take_along_axis(np.where(absent, 0, weights), order, 2)
        rows = self._rows.writer.new_rows(num_tokens)
        rows["experts"] = experts.swapaxes(0, 1)
        rows["weights"] = weights.swapaxes(0, 1)
        if self._lookahead is not None:
            rows["lookahead"] = self._lookahead.ids
        rows["sequence"] = current.sequences.repeat(current.num_positions)
        rows["phase"] = current.phase
        if current.token_ids is not None:
            rows["token_id"] = current.token_ids.reshape(-1).cpu().numpy()
        kept = self._kept(current, rows["token_id"])
        self._rows.add(rows if kept is None else rows[kept])

    def _kept(self, current: "_Pass", token_ids: np.ndarray) -> np.ndarray | None:
        """Tell which tokens are not padding: [T] bool, None for all."""
        kept = None
        if current.attention_mask is not None:
            kept = current.attention_mask[:, -current.num_positions :].reshape(-1).cpu().numpy() != 0
            if len(kept) != len(token_ids):
                kept = None
        if current.phase == DECODE and len(current.sequences) > 1 and self._padding:
            alive = ~np.isin(token_ids, self._padding)
            kept = alive if kept is None else kept & alive
        return kept


class _Pass:
    """A pass under way: its tokens, and the layers seen so far."""

    def __init__(
        self,
        token_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        sequences: np.ndarray,
        num_positions: int,
        phase: int,
    ) -> None:
        self.token_ids = token_ids
        self.attention_mask = attention_mask
        self.sequences = sequences
        self.num_positions = num_positions
        self.phase = phase
        self.num_tokens = len(sequences) * num_positions
        self.seen: set[int] = set()


def check_no_trace(model: Any) -> None:
    """Refuse a model whose passes are recorded, for callers that mix sequences.

    Raises:
        ConfigError: it was loaded with trace=.
    """
    observers = getattr(getattr(model, "moeflow", None), "observers", ())
    if any(isinstance(observer, TraceRecorder) for observer in observers):
        raise ConfigError("a trace records whole batches of sequences, not an engine's steps: load without trace=.")


def attach_recorder(model: Any, path: str | Path, *, lookahead: bool = False) -> TraceRecorder:
    """Record every pass of a model that load_moe built, until its runtime is closed.

    Args:
        model: has its experts behind the runtime and the runtime as `model.moeflow`.
        path: the trace; appended to where it exists.
        lookahead: whether to record the early answers of the coming layers' routers as well, for replays.

    Raises:
        TraceError: the file is of another model, damaged, or cannot be written; the model has no such routers.
    """
    runtime = model.moeflow
    num_layers = len(experts_interface.experts_modules(model))  # a runtime may have more, for drafts
    experts_per_layer = tuple(runtime.experts_per_layer[:num_layers])
    top_k = experts_interface.num_experts_per_tok(model)
    format = TraceFormat(
        experts_per_layer,
        top_k,
        model_fingerprint(model),
        source=f"recorded from {model.config.name_or_path or type(model).__name__}",
    )
    record = None
    if lookahead:
        predictor = build_lookahead(model, top_k)
        if predictor is None or not predictor.reach:
            raise TraceError(
                "lookahead needs several layers whose routers are one matrix behind a norm, and this model has none "
                "such. Record it without."
            )
        record = LookaheadRecord(predictor, ResidualTap(model), min(2 * top_k, *experts_per_layer), format.none)
        format = replace(format, lookahead=record.shape)
    generation = getattr(model, "generation_config", None)
    padding = getattr(generation, "pad_token_id", None)
    if padding is None:
        padding = getattr(generation, "eos_token_id", None)
    padding = frozenset([padding] if isinstance(padding, int) else padding or ())
    try:
        recorder = TraceRecorder(path, format, padding=padding, lookahead=record)
    except TraceError:
        if record is not None:
            record.close()
        raise
    runtime.observers.append(recorder)
    return recorder


def _has_weakref(value: Any) -> bool:
    return value is not None and hasattr(value, "__weakref__")
