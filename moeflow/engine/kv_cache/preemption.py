"""Preemption: what becomes of keys and values whose sequence gives way, by measured speeds.

Plain numbers; the caller has the clock and the tensors.
"""

_WEIGHT = 0.25  # of a new measurement in an average


class MeasuredSpeeds:
    """Moving averages of what it costs to compute a token of a prompt and to copy a byte to host memory and back.

    Attributes:
        prefill_s: seconds per token; None while not measured.
        copy_s: seconds per byte, one way; None while not measured.
        read_s: seconds per byte that is read from a file; None while not measured.
    """

    def __init__(self) -> None:
        self.prefill_s: float | None = None
        self.copy_s: float | None = None
        self.read_s: float | None = None

    def saw_prefill(self, num_tokens: int, seconds: float) -> None:
        """Take in a step that computed tokens of prompts."""
        self.prefill_s = _average(self.prefill_s, seconds / num_tokens)

    def saw_copy(self, num_bytes: int, seconds: float) -> None:
        """Take in a copy between the device and host memory."""
        self.copy_s = _average(self.copy_s, seconds / num_bytes)

    def saw_read(self, num_bytes: int, seconds: float) -> None:
        """Take in a file of keys and values that was read."""
        self.read_s = _average(self.read_s, seconds / num_bytes)

    def favour_copy(self, num_tokens: int, num_bytes: int, free_bytes: int) -> bool:
        """Tell whether keys and values go to host memory; else they are dropped and computed again.

        They go where both copies take less time than the computation. A copy that was never measured is tried.

        Args:
            num_tokens: positions to keep.
            num_bytes: their keys and values.
            free_bytes: host memory that may be taken.
        """
        if not 0 < num_bytes <= free_bytes:
            return False
        if self.copy_s is None:
            return True
        return self.prefill_s is not None and 2 * self.copy_s * num_bytes < self.prefill_s * num_tokens


def _average(before: float | None, new: float) -> float:
    return new if before is None else before + _WEIGHT * (new - before)
