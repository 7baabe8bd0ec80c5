"""Counters of a running model, prefill and decode apart."""

from dataclasses import dataclass, fields


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

    def as_dict(self) -> dict:
        """Return the counters and the hit rate (None where nothing was demanded)."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        demands = self.hits + self.misses
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
