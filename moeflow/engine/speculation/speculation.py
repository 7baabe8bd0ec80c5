"""Speculation of one engine: asks sources for drafts, lets the gate cut them, and counts what came of them."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from moeflow.engine.request import Chosen
from moeflow.engine.sequence import Piece, Sequence
from moeflow.engine.speculation.drafts import NO_DRAFT, Draft, DraftSource, checked
from moeflow.engine.speculation.foreseen_waits import ForeseenWaits
from moeflow.engine.speculation.options import SpeculationOptions
from moeflow.hf.passes.step_rows import EXACT_ROWS
from moeflow.policy.speculation import Acceptance, SpeculationGate
from moeflow.policy.step_times import Step

_log = logging.getLogger(__name__)

MOST_ROWS = 32
_MOST_DROPPED = 3  # steps in a row whose drafts the runner left out
_WORTH_ASKING = 1.0  # expected tokens of other drafts, from which a source that costs is not asked


@dataclass
class SourceCounts:
    """What became of the tokens of one source.

    Args:
        proposed: tokens that a step verified.
        accepted: of these, those that were chosen.
        seconds: in proposing.
        reason: why it is off; None while it is on.
    """

    proposed: int = 0
    accepted: int = 0
    seconds: float = 0.0
    reason: str | None = None


class Drafted(NamedTuple):
    """A draft that a step verifies.

    Args:
        source: which proposed it.
        draft: what.
    """

    source: DraftSource
    draft: Draft


class Rows(Protocol):
    """What computes drafts.

    Attributes:
        was_native: whether the last pass was a native step.
    """

    was_native: bool

    def room_behind(self, sequence: Sequence) -> int:
        """Return how many positions there are behind a running sequence's tokens."""
        ...


class Speculation:
    """Speculation of one engine.

    Args:
        options: what was asked for.
        sources: of drafts.
        gate: which says how many tokens pay.
        vocab_size: tokens of the model.
        runner: that computes them.
        max_step_tokens: most tokens of a step.
        reason: why there are no drafts, whatever the gate says; None where there may be.
        foreseen: foresees which experts drafts wait for; None where nothing of that kind is known.
    """

    def __init__(
        self,
        options: SpeculationOptions,
        sources: list[DraftSource],
        gate: SpeculationGate,
        vocab_size: int,
        runner: Rows,
        max_step_tokens: int,
        reason: str | None = None,
        foreseen: ForeseenWaits | None = None,
    ) -> None:
        self._options, self._sources, self._gate = options, sources, gate
        self._vocab_size, self._runner = vocab_size, runner
        self._most_rows = min(max_step_tokens, MOST_ROWS if options.packed else EXACT_ROWS)
        self._acceptance = Acceptance()
        self._counts = {source.name: SourceCounts() for source in sources}
        self._reason = reason
        self._foreseen = foreseen
        self._drafted: dict[str, Drafted] = {}  # of the step under way, by sequence
        self._is_plain = False  # whether the step under way decodes and does nothing else
        self._num_dropped = 0
        self._num_tokens = 0  # that the step under way has given
        self._seen_rows: set[int] = set()  # powers of two, of which a step was run
        self._steps = {"speculated": 0, "plain": 0}

    def extend(self, pieces: list[Piece]) -> list[Piece]:
        """Return the pieces of a step, with drafts behind those that decode where they pay."""
        self._drafted, self._num_tokens = {}, 0
        self._is_plain = all(len(one.tokens) == 1 and one.sequence.decoding for one in pieces)
        if self._foreseen is not None:
            self._foreseen.begin_step(routes=self._reason is None and (not self._is_plain or self._gate.nearly_on))
        if not self._is_plain or self._reason is not None:
            return pieces
        if not (self._runner.was_native or self._options.packed):
            self._gate.reason = "steps do not run natively"
            return pieces
        if self._options.gated and self._foreseen is not None and self._foreseen.costs is None:
            self._waits(pieces, [], [])  # so that it learns from plain steps
        most = min(self._options.most, self._most_rows - len(pieces))
        if most < 1:
            self._gate.reason = f"{len(pieces)} sequences are as many rows as a step may have"
            return pieces
        if self._options.gated and not self._gate.wants_drafts(len(pieces)):
            return pieces
        found = [self._best(piece.sequence, most) for piece in pieces]
        chances = [self._chances(one) for one in found]
        if self._options.gated:
            counts = self._gate.choose(len(pieces), chances, partial(self._waits, pieces, found))
        else:
            counts = _all(chances, most)
        extended = []
        for piece, one, count in zip(pieces, found, counts, strict=True):
            if one is not None and count:
                draft = Draft(one.draft.tokens[:count], one.draft.probabilities[:count])
                self._drafted[piece.sequence.id] = Drafted(one.source, draft)
                piece = piece._replace(draft=draft.tokens)
            extended.append(piece)
        return extended

    def judge(self, piece: Piece, logits: torch.Tensor, chosen: Chosen) -> None:
        """Take in what a pass computed of a piece.

        Args:
            piece: as it was computed.
            logits: [1 + D, V], behind its last token and those of its draft.
            chosen: what its request chose from these.
        """
        if self._reason is not None:
            return
        self._num_tokens += len(chosen.token_ids)
        if self._gate.is_on:
            tokens = [piece.tokens[-1], *piece.draft]
            for source in self._on():
                self._guarded(source, partial(source.saw, tokens, logits))
        if not piece.draft:
            self._drafted.pop(piece.sequence.id, None)
            return
        source, draft = self._drafted[piece.sequence.id]
        counts = self._counts[source.name]
        counts.proposed += len(draft.tokens)
        counts.accepted += chosen.num_accepted
        if self._foreseen is not None:
            self._foreseen.accept(piece.sequence.id, chosen.num_accepted)
        for place, promised in enumerate(draft.probabilities[: chosen.num_judged]):
            self._acceptance.judge(source.name, place, promised, accepted=place < chosen.num_accepted)

    def finish(self, pieces: list[Piece], step_s: float) -> None:
        """Take in the seconds of a step that was to compute these pieces."""
        if not self._is_plain or self._reason is not None:
            return
        wanted = any(piece.draft for piece in pieces)
        num_drafted = sum(len(one.draft.tokens) for one in self._drafted.values())
        if wanted and not self._drafted:
            self._num_dropped += 1
            if self._num_dropped >= _MOST_DROPPED:
                self._reason = "steps with drafts fail, or do not run natively"
            return
        self._num_dropped = 0
        self._steps["speculated" if num_drafted else "plain"] += 1
        size = 1 << (len(pieces) + num_drafted - 1).bit_length()
        if size in self._seen_rows:  # before, its program may have been prepared
            step = Step(step_s) if self._foreseen is None else self._foreseen.finish_step(num_drafted, step_s)
            self._gate.finish(len(pieces), num_drafted, self._num_tokens, step)
        self._seen_rows.add(size)

    def forget(self, id: str) -> None:
        """Drop a sequence that has ended."""
        for source in self._on():
            self._guarded(source, partial(source.forget, id))
        if self._foreseen is not None:
            self._foreseen.forget(id)

    def stats(self) -> dict[str, Any]:
        """Return whether and why, what became of drafts by source, and what steps take by drafted tokens."""
        gate = self._gate
        return {
            "on": self._reason is None and gate.is_on,
            "reason": self._reason or gate.reason,
            **{f"{name}_steps": count for name, count in self._steps.items()},
            **gate.gains._asdict(),
            "growth": gate.times.growths(),
            "union": gate.times.unions(),
            "waits": None if self._foreseen is None or not (costs := self._foreseen.costs) else costs._asdict(),
            "sources": {name: asdict(counts) for name, counts in self._counts.items()},
        }

    def _waits(
        self, pieces: list[Piece], found: list["Drafted | None"], tokens: list[tuple[int, int]]
    ) -> list[float] | None:
        """Foresee the waits of a step of pieces and of tokens of their drafts; see `SpeculationGate.choose`."""
        if self._foreseen is None or not self._foreseen.wanted:
            return None
        fed = [(piece.sequence.id, piece.tokens[-1]) for piece in pieces]
        drafts = [() if one is None else one.draft.tokens for one in found]
        fed += [(pieces[row].sequence.id, drafts[row][place]) for row, place in tokens]
        return self._foreseen.waits(fed, len(pieces))

    def _on(self) -> list[DraftSource]:
        return [source for source in self._sources if self._counts[source.name].reason is None]

    def _best(self, sequence: Sequence, most: int) -> Drafted | None:
        """Return the draft of a sequence that promises most tokens; None where there is none."""
        left = sequence.max_new_tokens - len(sequence.token_ids) - 1
        most = min(most, left, self._runner.room_behind(sequence))
        if most < 1:
            return None
        best, promised = None, 0.0
        for source in sorted(self._on(), key=lambda one: one.costs):
            if source.costs and promised >= _WORTH_ASKING:
                continue
            begin = time.perf_counter()
            draft = self._guarded(source, partial(self._proposal, source, sequence, most))
            self._counts[source.name].seconds += time.perf_counter() - begin
            found = Drafted(source, draft or NO_DRAFT)
            expected = _expected(self._chances(found))
            if expected > promised:
                best, promised = found, expected
        return best

    def _proposal(self, source: DraftSource, sequence: Sequence, most: int) -> Draft:
        return checked(source.propose(sequence, most), most, self._vocab_size)

    def _chances(self, drafted: Drafted | None) -> list[float]:
        """Return of each token of a draft how likely it is accepted where those before it are."""
        if drafted is None:
            return []
        source, draft = drafted
        return [
            self._acceptance.probability(source.name, place, promised)
            for place, promised in enumerate(draft.probabilities)
        ]

    def _guarded(self, source: DraftSource, call: Callable[[], Any]) -> Any:
        """Call a source; an error in it ends its part, and no answer depends on it."""
        try:
            return call()
        except Exception as error:  # of any source, a draft model's too
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            self._counts[source.name].reason = reason
            _log.warning("drafts of %s are off, answers stay as they are: %s", source.name, reason)
            if not self._on():
                self._reason = "every source of drafts is off"
            return None


def _expected(chances: list[float]) -> float:
    """Return how many tokens of a draft are accepted on average."""
    expected, reached = 0.0, 1.0
    for chance in chances:
        reached *= chance
        expected += reached
    return expected


def _all(chances: list[list[float]], most: int) -> list[int]:
    """Return numbers of tokens, as many as a step may verify, shared out one after the other."""
    counts = [0] * len(chances)
    for place in range(most):
        for row, own in enumerate(chances):
            if place < len(own) and sum(counts) < most:
                counts[row] += 1
    return counts
