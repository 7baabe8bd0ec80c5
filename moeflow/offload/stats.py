"""Counters of a running model, prefill and decode apart."""

from dataclasses import asdict, dataclass, field


@dataclass
class Decisions:
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
class PhaseStats:
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
    decisions: Decisions = field(default_factory=Decisions)

    def as_dict(self) -> dict:
        """Return the counters and the hit rate (None where nothing was demanded)."""
        values = asdict(self)
        demands = self.hits + self.misses
        values["decisions"] |= {"resident": self.hits, "waited_for_prefetch": self.waited_for_prefetch}
        values["hit_rate"] = self.hits / demands if demands else None
        return values


class Stats:
    """The counters of both phases; `now` is the phase of the pass under way."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self.prefill = PhaseStats()
        self.decode = PhaseStats()
        self.now = self.prefill

    def begin_forward(self, num_sequences: int, num_positions: int, *, continues: bool) -> None:
        """Count a pass of [num_sequences, num_positions] new tokens; one that continues a key-value cache is decode."""
        self.now = self.decode if continues else self.prefill
        self.now.forwards += 1
        self.now.tokens += num_sequences * num_positions
