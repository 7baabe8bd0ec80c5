"""What a governor of experts' memory is asked, whichever memory it measures."""

from typing import Protocol


class Governor(Protocol):
    """Limits the number of slots in use, or the units of the cache's limit, by the memory that is free."""

    def slots(self, used: int, limit: int, *, now: bool = False) -> int:
        """Return the limit from here on.

        Args:
            used: units in use.
            limit: the present limit.
            now: measure in this pass, however recent the last measurement.
        """
        ...

    def stats(self) -> dict[str, int]:
        """Return the bytes that it tells of, by name."""
        return {}
