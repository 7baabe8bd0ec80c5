"""What a byte of memory is worth: held by an expert, or by keys and values that may be wanted again.

Both in seconds saved a second, for each byte, so that they can be compared where both share one budget.
"""

_AWAY_S = 60.0  # after which somebody who is away is half as likely to come back within the next second as at first


def expert_worth(stall_share: float, absent_bytes: int) -> float:
    """Return what one more byte of experts saves.

    Misses cost their share of the time. Absent experts cause them, each byte of these as many as any other.

    Args:
        stall_share: seconds of a second in which compute waits for experts.
        absent_bytes: of all experts that are not in memory.
    """
    return stall_share / absent_bytes if absent_bytes else 0.0


def kept_worth(
    num_tokens: int, num_bytes: int, *, idle_s: float, reused_share: float, prefill_s: float | None
) -> float:
    """Return what a byte of kept keys and values saves.

    The chance that they are used in the next second falls with the time in which they were not: who has been away for
    long is likely to stay away for as long again.

    Args:
        num_tokens: that would have to be computed again.
        num_bytes: that they take.
        idle_s: seconds since they were used.
        reused_share: of all that was kept, the share that was used again.
        prefill_s: seconds to compute a token of a prompt; None while not measured, which makes them worth anything.
    """
    if prefill_s is None:
        return float("inf")
    return reused_share / (idle_s + _AWAY_S) * num_tokens * prefill_s / max(num_bytes, 1)
