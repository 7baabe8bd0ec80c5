"""Times a piece of work again and again, and takes the median.

Knows a clock. Knows nothing of what runs.
"""

import statistics
import time
from collections.abc import Callable

_LEAST = 3  # measurements, however long they take


def median_seconds(run: Callable[[], object], seconds: float) -> float:
    """Return the median time of a call, after one that is not counted.

    Args:
        run: the work.
        seconds: to spend on it; at least three calls are timed.
    """
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _LEAST or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
