"""Counters of a running model: prefill and decode apart, prediction, and reads.

Knows numbers. Knows nothing of tiers, threads or models.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from moeflow.core import ExpertKey
from moeflow.hardware import process_memory_bytes
from moeflow.policy.cache import ExpertCache
from moeflow.policy.prefetch_ledger import PrefetchCounts

if TYPE_CHECKING:
    from moeflow.hf.passes.forward import ForwardPass

_Own = TypeVar("_Own", bound="Counters")
_NOW = {"now": True}  # metadata of a field that says how things are now and counts nothing


@dataclass
class Counters:
    """Fields that count; the difference of two snapshots is what was counted between them."""

    def __sub__(self: _Own, before: _Own) -> _Own:
        """Return what was counted since `before`; what counts nothing is as it is in `self`."""
        names = [one.name for one in fields(self) if "now" not in one.metadata]
        counted = {
            name: getattr(self, name) - getattr(before, name) for name in names if getattr(self, name) is not None
        }
        return replace(self, **counted)


@dataclass
class Decisions(Counters):
    """What was done about the demanded experts of one phase, and how often a layer had to wait for it.

    Of every demanded expert one of these; "resident" (`hits`) and "waited_for_prefetch" complete them in `stats()`:

    Args:
        read: it was on disk only, so a read was started.
        copied: it lay in the host tier, and the copy to the device was foreseen to end sooner, or is the only way.
        computed_on_host: it lay in the host tier and was computed there, which was foreseen to end sooner.

    Of these, some are sent to the device as well:

        copied_after_compute: the link had nothing else to do, so that an expert is there the next time.

    Of layers, once in every pass that served all of their experts; on a GPU only the host's waiting is seen:

        layers_ready: no expert had to be brought, all were resident or computed on the host.
        layers_waited: compute stood still until an expert arrived.
        went_on_with_resident: some experts had to be brought, and those that were there were computed meanwhile.
        hidden_behind_resident: of these, the layers that then never waited.
    """

    read: int = 0
    copied: int = 0
    computed_on_host: int = 0
    copied_after_compute: int = 0
    layers_ready: int = 0
    layers_waited: int = 0
    went_on_with_resident: int = 0
    hidden_behind_resident: int = 0


@dataclass
class PhaseStats(Counters):
    """What happened in one phase.

    Args:
        forwards: passes of the model.
        tokens: new positions in them, padding included.
        hits: demanded experts that were resident; one demand is one expert in one layer of one pass.
        misses: demanded experts that were not.
        waited_for_prefetch: misses whose copy was under way already.
        evictions: experts dropped from the device to make room.
        bytes_from_disk: bytes read from the checkpoint.
        bytes_from_host: bytes copied from the host tier.
        stall_s: seconds in which compute waited for a copy.
        compute_s: seconds in the experts' arithmetic.
        predict_s: seconds in the predictor and in planning what to prefetch.
        timed_s: seconds from the beginning of passes to that of the decode steps right behind them.
        timed_tokens: tokens of those passes.
        decisions: what was done about the demands.
    """

    forwards: int = 0
    tokens: int = 0
    hits: int = 0
    misses: int = 0
    waited_for_prefetch: int = 0
    evictions: int = 0
    bytes_from_disk: int = 0
    bytes_from_host: int = 0
    stall_s: float = 0.0
    compute_s: float = 0.0
    predict_s: float = 0.0
    timed_s: float = 0.0
    timed_tokens: int = 0
    decisions: Decisions = field(default_factory=Decisions)

    @property
    def hit_rate(self) -> float | None:
        """Share of the demands that were resident; None where nothing was demanded."""
        demands = self.hits + self.misses
        return self.hits / demands if demands else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second of the passes whose time is known; None where there is none."""
        return self.timed_tokens / self.timed_s if self.timed_s > 0 else None

    def copy(self) -> "PhaseStats":
        """Return a snapshot, which later passes do not change."""
        return replace(self, decisions=replace(self.decisions))

    def as_dict(self) -> dict[str, Any]:
        """Return the counters and the hit rate (None where nothing was demanded)."""
        values: dict[str, Any] = asdict(self)
        values["decisions"] |= {"resident": self.hits, "waited_for_prefetch": self.waited_for_prefetch}
        values["hit_rate"] = self.hit_rate
        return values


@dataclass
class PredictionStats(Counters):
    """What prediction did.

    Args:
        predictor: the predictor's name.
        on: whether decode steps are predicted now.
        reason: of that.
        failure: what ended prediction; None while it runs.
        steps_on: decode steps that were predicted.
        steps_off: decode steps that were not.
        trials: comparisons of steps with and without prediction.
        prefetch: what became of the prefetches.
    """

    predictor: str = field(metadata=_NOW)
    on: bool = field(metadata=_NOW)
    reason: str = field(metadata=_NOW)
    failure: str | None = field(metadata=_NOW)
    steps_on: int
    steps_off: int
    trials: int
    prefetch: PrefetchCounts

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, with the prefetches by distance and in all."""
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"prefetch": self.prefetch.as_dict()}


@dataclass
class ReadStats(Counters):
    """What was read from disk.

    Args:
        mode: how files are read.
        reads: reads of one expert.
        bytes: bytes of them.
        read_s: seconds in them, summed over the threads.
        threads: threads that read.
    """

    mode: str = field(metadata=_NOW)
    reads: int
    bytes: int
    read_s: float
    threads: int = field(metadata=_NOW)


class Contract(Protocol):
    """The plan that a model was loaded by."""

    def check_pass(self, begun: "ForwardPass") -> None:
        """Refuse a pass that is longer, or whose sequences are, than planned."""

    def get(self, name: str, default: int) -> int:
        """Return bytes that an engine asks for: "key_value_bytes"."""

    def told(self, memory: dict[str, int], prefill: PhaseStats, decode: PhaseStats) -> dict[str, Any]:
        """Return what was planned and what is."""


@dataclass
class RuntimeStats(Counters):
    """What a runtime's `stats()` says, as numbers.

    Args:
        device: where experts are computed.
        policy: of eviction.
        slots: slots that may be used now.
        num_experts: of all layers.
        prefill: counters of passes that continue nothing.
        decode: counters of passes that continue a key-value cache.
        memory: bytes now and at most, by name.
        plan: bytes by use, as divided while loading: all uses of a GPU; on the CPU at most keys and values. Where a
            model was loaded by a plan, its contract, which tells planned and actual.
        miss: bandwidths that decide where a miss is computed, as averaged until now; None where it is always copied.
        prediction: None without a predictor.
        io: reads from disk.
        integrity: what was found where slots are compared with their source; None where they are not.
        step: what runs decode steps, why not natively where they never will, and how many ran so; see `StepDecoding`.
        speculation: what drafts of `generate` brought; None where there are none.
    """

    device: str = field(metadata=_NOW)
    policy: str = field(metadata=_NOW)
    slots: int = field(metadata=_NOW)
    num_experts: int = field(metadata=_NOW)
    prefill: PhaseStats
    decode: PhaseStats
    memory: dict[str, int] = field(metadata=_NOW)
    plan: "dict[str, Any] | Contract | None" = field(metadata=_NOW)
    miss: dict[str, float | None] | None = field(metadata=_NOW)
    prediction: PredictionStats | None
    io: ReadStats
    step: dict[str, Any] = field(metadata=_NOW)
    integrity: dict[str, Any] | None = field(default=None, metadata=_NOW)
    speculation: dict[str, Any] | None = field(default=None, metadata=_NOW)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as one dict that `json.dumps` takes."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        if self.plan is not None and not isinstance(self.plan, dict):
            values["plan"] = self.plan.told(self.memory, self.prefill, self.decode)
        prediction = None if self.prediction is None else self.prediction.as_dict()
        phases = {"prefill": self.prefill.as_dict(), "decode": self.decode.as_dict()}
        return values | phases | {"prediction": prediction, "io": asdict(self.io)}


class PythonSteps:
    """Decode steps of a model whose own code runs them all."""

    def as_dict(self) -> dict[str, Any]:
        """Return the mode, no reason, and no other steps."""
        return {"mode": "python", "reason": None, "steps": 0}


def memory_stats(caches: Sequence[ExpertCache], unit_bytes: tuple[int, int], num_experts: list[int]) -> dict[str, int]:
    """Return the bytes that experts and the process take, now and at most, by name.

    Args:
        caches: of the device, and of the host tier if there is one.
        unit_bytes: of one unit of each; the second is not used without a host tier.
        num_experts: [num_layers].
    """
    keys = [ExpertKey(layer, expert) for layer, count in enumerate(num_experts) for expert in range(count)]
    memory = {
        "all_experts_bytes": unit_bytes[0] * sum(map(caches[0].size, keys)),
        "host_bytes": 0,
        "host_peak_bytes": 0,
    }
    for name, cache, unit in zip(("device", "host"), caches, unit_bytes, strict=False):
        memory |= {f"{name}_bytes": cache.used * unit, f"{name}_peak_bytes": cache.peak_used * unit}
    memory["process_bytes"], memory["process_peak_bytes"] = process_memory_bytes()
    return memory


class Stats:
    """The counters of both phases; `now` is the phase of the pass under way."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self.prefill = PhaseStats()
        self.decode = PhaseStats()
        self.now = self.prefill
        self._begun_s: float | None = None  # when the last pass did, of `_begun_tokens` tokens
        self._begun_tokens = 0

    def begin_forward(self, num_sequences: int, num_positions: int, *, continues: bool) -> None:
        """Count a pass of [num_sequences, num_positions] new tokens; one that continues a key-value cache is decode."""
        begins_s, num_tokens = time.perf_counter(), num_sequences * num_positions
        if continues and num_positions == 1 and self._begun_s is not None:  # else somebody may have waited between
            self.now.timed_s += begins_s - self._begun_s
            self.now.timed_tokens += self._begun_tokens
        self._begun_s, self._begun_tokens = begins_s, num_tokens
        self.now = self.decode if continues else self.prefill
        self.now.forwards += 1
        self.now.tokens += num_tokens

    def demanded(self) -> tuple[int, float]:
        """Return demanded experts of both phases, and the seconds that compute waited for any."""
        phases = self.prefill, self.decode
        return sum(one.hits + one.misses for one in phases), sum(one.stall_s for one in phases)

    def copy(self) -> tuple[PhaseStats, PhaseStats]:
        """Return a snapshot of both phases."""
        return self.prefill.copy(), self.decode.copy()

    def restore(self, counted: tuple[PhaseStats, PhaseStats] | None) -> None:
        """Go back to a snapshot, if there is one; the next pass says which phase it counts in."""
        if counted is not None:
            self.prefill, self.decode = counted
            self.now, self._begun_s = self.prefill, None
