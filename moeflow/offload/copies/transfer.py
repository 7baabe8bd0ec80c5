"""One expert in flight: where its bytes come from, where they go, and the read that brings them."""

from typing import Any

from moeflow.core import ExpertKey, Tier

Work = tuple[Any, ...]  # a function, then its arguments


class Transfer:
    """One expert on its way into one device slot.

    Args:
        key: the expert.
        slot: the device slot.
        source: the tier its bytes come from.
    """

    __slots__ = (
        "_work",
        "beside",
        "error",
        "event",
        "host_slot",
        "key",
        "num_bytes",
        "prefetch",
        "seconds",
        "slot",
        "source",
    )

    def __init__(self, key: ExpertKey, slot: int, source: Tier, host_slot: int | None, *, prefetch: bool) -> None:
        self.key = key
        self.prefetch = prefetch  # whether no layer waits for it yet
        self.slot = slot
        self.source = source
        self.host_slot = host_slot
        self.event: object = None
        self.error: Exception | None = None
        self.num_bytes = 0
        self.seconds = 0.0  # from the start of its work to its end, without the wait for a thread
        self.beside = False  # whether the CPU computed an expert while it was under way
        self._work: list[Work] = []

    def give_work(self, work: Work) -> None:
        """Attach the work of a reading thread."""
        self._work.append(work)

    def take_work(self) -> Work | None:
        """Take the work, or None where it is taken already: of all threads one succeeds."""
        try:
            return self._work.pop()
        except IndexError:
            return None
