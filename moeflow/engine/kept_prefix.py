"""The one ended sequence whose keys and values stay, while a sequence that begins soon may share its prompt.

Knows sequences. Knows nothing of tensors; a slot is freed by its id.
"""

from collections.abc import Callable

from moeflow.engine.sequence import Sequence


class KeptPrefix:
    """Keeps the slot of the last ended sequence whose prompt is wanted.

    Args:
        wanted: tells whether a sequence that begins soon could share the prompt of an ended one.
        free: releases the slot of a sequence, by its id.
    """

    def __init__(self, wanted: Callable[[Sequence], bool], free: Callable[[str], None]) -> None:
        self._wanted = wanted
        self._free = free
        self._kept: Sequence | None = None

    def offer(self, ended: Sequence) -> None:
        """Keep the slot of an ended sequence in place of the one before, or free it where no sequence wants it."""
        if self._wanted(ended):
            self.drop()
            self._kept = ended
        else:
            self._free(ended.id)

    def donors(self) -> list[Sequence]:
        """Return the kept sequence; none where nothing is kept."""
        return [] if self._kept is None else [self._kept]

    def drop(self) -> bool:
        """Free the kept slot, and tell whether there was one."""
        kept, self._kept = self._kept, None
        if kept is not None:
            self._free(kept.id)
        return kept is not None

    def drop_unwanted(self) -> None:
        """Free the kept slot where no sequence that begins soon wants it any more."""
        if self._kept is not None and not self._wanted(self._kept):
            self.drop()
