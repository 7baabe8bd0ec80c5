"""Splits a layer's misses: some are computed where their weights lie, the others copied to the device.

Plain numbers; the caller has the clock, the tensors and the tiers. Both ways are measured, each alone and beside the
other, because copies and the CPU draw on one memory.
"""

from collections.abc import Sequence

_SAMPLE_WEIGHT = 0.1  # of a new measurement in a moving average
_PROBE_WEIGHT = 0.5  # of the first measurement after the average went stale
_STALE_DECISIONS = 64  # without a measurement, after which an average is stale
_MAX_PROBE_TOKENS = 4  # of an expert that is sent to the CPU to measure it: no prefill is tried there


class _Pace:
    """Moving average of seconds per byte of expert weights, and the decisions since it was measured or asked for."""

    def __init__(self) -> None:
        self.s_per_byte: float | None = None
        self.age = _STALE_DECISIONS
        self._weight = 1.0  # of the next measurement

    def measure(self, num_bytes: int, seconds: float) -> None:
        """Enter one measurement."""
        value = seconds / num_bytes
        before = self.s_per_byte
        self.s_per_byte = value if before is None else before + self._weight * (value - before)
        self.age, self._weight = 0, _SAMPLE_WEIGHT

    def ask(self) -> bool:
        """Whether the average is stale; answers so once, and again only after as many decisions."""
        if self.age < _STALE_DECISIONS:
            return False
        self.age, self._weight = 0, _PROBE_WEIGHT
        return True


class MissSplit:
    """Splits the misses of a layer between the link to the device and the CPU, so that both end soonest.

    Of m experts that take equal times, q are copied: q = m * B_copy / (B_copy + B_host), rounded to whole experts by
    the finishing time max(q / B_copy, (m - q) / B_host). B_host is what the CPU gets while copies run, because that is
    what is measured. (FreeToken writes q = m * B_copy / B_host. That is the same split where B_host is the bandwidth of
    the whole memory, of which the copies take B_copy and leave the rest to the CPU.) Here experts may differ in tokens,
    the link may have copies under way already, and the figures of one kind alone are known apart, so the whole numbers
    are tried one after the other.

    A figure that is missing or stale is measured now and then by sending one expert that way. Where copying and
    computing take equal time, copying wins: a copied expert is there the next time.
    """

    def __init__(self) -> None:
        # Of copies, and of computations by `_size`; each alone (False) and beside the other kind (True).
        self._copy = {beside: _Pace() for beside in (False, True)}
        self._host: dict[bool, dict[int, _Pace]] = {beside: {0: _Pace()} for beside in (False, True)}

    def split(self, num_tokens: Sequence[int], num_bytes: int, num_ahead: int = 0) -> int:
        """Decide for the misses of one layer that could be computed on the CPU.

        Args:
            num_tokens: tokens routed to each of the m experts, ascending.
            num_bytes: bytes of one of them.
            num_ahead: copies that occupy the link already.

        Returns:
            How many of them to compute on the CPU: the first ones, which have the fewest tokens.
        """
        m = len(num_tokens)
        if not m:
            return 0
        self._grow_older()
        on_host = self._fastest(num_tokens, num_bytes, num_ahead)
        if on_host == m and self._copy[m > 1].ask():
            return m - 1
        if on_host == 0 and num_tokens[0] <= _MAX_PROBE_TOKENS:
            beside = m > 1 or num_ahead > 0
            if self._host[beside].setdefault(_size(num_tokens[0]), _Pace()).ask():
                return 1
        return on_host

    def copied(self, num_bytes: int, seconds: float, *, beside: bool) -> None:
        """Enter the seconds of a copy from the host tier, and whether the CPU computed an expert meanwhile."""
        self._copy[beside].measure(num_bytes, seconds)

    def computed(self, num_bytes: int, num_tokens: int, seconds: float, *, beside: bool) -> None:
        """Enter the seconds of an expert on the CPU, with its activations' way, and whether copies ran meanwhile."""
        self._host[beside].setdefault(_size(num_tokens), _Pace()).measure(num_bytes, seconds)

    def finish_s(self, num_tokens: Sequence[int], num_bytes: int, num_ahead: int, on_host: int) -> float | None:
        """Estimate the seconds until a layer's misses are done; None while a measurement for that is missing.

        Args:
            on_host: how many of them, the first ones, the CPU computes; else as for `split`.
        """
        copies = len(num_tokens) - on_host
        beside = bool(on_host and (copies or num_ahead))
        copy, host = 0.0, 0.0
        if copies:
            pace = self._copy_pace(beside)
            if pace is None:
                return None
            copy = (num_ahead + copies) * num_bytes * pace
        if on_host:
            paces = {}
            for tokens in set(num_tokens[:on_host]):
                pace = self._host_pace(tokens, beside)
                if pace is None:
                    return None
                paces[tokens] = pace
            host = num_bytes * sum(paces[tokens] for tokens in num_tokens[:on_host])
        return max(copy, host)

    def as_dict(self) -> dict[str, float | None]:
        """Return the measured bandwidths, the CPU's for one token; None where not measured."""
        return {
            "copy_bytes_per_s": _rate(self._copy[False]),
            "copy_beside_compute_bytes_per_s": _rate(self._copy[True]),
            "host_bytes_per_s": _rate(self._host[False][0]),
            "host_beside_copies_bytes_per_s": _rate(self._host[True][0]),
        }

    def _fastest(self, num_tokens: Sequence[int], num_bytes: int, num_ahead: int) -> int:
        best, best_s = 0, self.finish_s(num_tokens, num_bytes, num_ahead, 0)
        if best_s is None:
            return 0
        for on_host in range(1, len(num_tokens) + 1):
            seconds = self.finish_s(num_tokens, num_bytes, num_ahead, on_host)
            if seconds is not None and seconds < best_s:
                best, best_s = on_host, seconds
        return best

    def _copy_pace(self, beside: bool) -> float | None:
        pace = self._copy[beside].s_per_byte
        return self._copy[not beside].s_per_byte if pace is None else pace

    def _host_pace(self, num_tokens: int, beside: bool) -> float | None:
        """Return the seconds per byte for a number of tokens; from fewer tokens, as if each took its own pass.

        That is an upper bound, which keeps a prefill off the CPU without trying.
        """
        measured = {
            size: pace.s_per_byte
            for situation in (not beside, beside)
            for size, pace in self._host[situation].items()
            if pace.s_per_byte is not None
        }
        if not measured:
            return None
        wanted = _size(num_tokens)
        nearest = max((size for size in measured if size <= wanted), default=min(measured))
        return measured[nearest] * 2 ** max(wanted - nearest, 0)

    def _grow_older(self) -> None:
        for beside in (False, True):
            for pace in (self._copy[beside], *self._host[beside].values()):
                pace.age += 1


def _size(num_tokens: int) -> int:
    """Return the class of a number of tokens: 1, 2, 3 to 4, 5 to 8, ... are 0, 1, 2, 3, ..."""
    return (num_tokens - 1).bit_length()


def _rate(pace: _Pace) -> float | None:
    return None if pace.s_per_byte is None else 1 / pace.s_per_byte
