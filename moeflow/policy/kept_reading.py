"""Whether kept keys and values are read from files: where that takes less time than computing them again.

Plain numbers; the caller has the clock and the files.
"""


def num_worth_reading(
    num_bytes: list[int], places: list[int], here: int, *, read_s: float | None, prefill_s: float | None
) -> int:
    """Return how many files are read, of some that follow each other: those that save the most time; 0 for none.

    Where a speed was not measured yet, as many as lead farthest.

    Args:
        num_bytes: of each file.
        places: tokens behind which the prompt can go on with it and those before it.
        here: likewise with none of them.
        read_s: seconds to read a byte.
        prefill_s: seconds to compute a token of a prompt.
    """
    best, most_saved = 0, 0.0
    for count, place in enumerate(places, start=1):
        saved = float(place - here)
        if read_s is not None and prefill_s is not None:
            saved = saved * prefill_s - sum(num_bytes[:count]) * read_s
        if saved > most_saved:
            best, most_saved = count, saved
    return best
