"""Repeats within a sequence: the latest earlier position of the same token, or of the same run of tokens."""

import numpy as np

NUM_ORDERS = 3  # runs of one, two and three tokens


class RepeatFinder:
    """Finds, token by token, the latest earlier position at which the last 1, 2 and 3 tokens were the same."""

    def __init__(self) -> None:
        self._latest: list[dict[tuple, int]] = [{} for _ in range(NUM_ORDERS)]
        self._tail: tuple = ()
        self._position = 0
        self._longest, self._run = -1, 0

    def feed(self, token_id: int) -> tuple[list[int], int]:
        """Take in the token fed next.

        Returns:
            For each run length its latest earlier position, -1 where there is none; and the tokens that the longest
            run lasts so far without a break.
        """
        self._tail = (*self._tail[1 - NUM_ORDERS :], token_id) if self._tail else (token_id,)
        found = []
        for order, latest in enumerate(self._latest, 1):
            if len(self._tail) < order:
                found.append(-1)
                continue
            run = self._tail[-order:]
            found.append(latest.get(run, -1))
            latest[run] = self._position
        longest = found[-1]
        self._run = 0 if longest < 0 else self._run + 1 if longest == self._longest + 1 else 1
        self._longest = longest
        self._position += 1
        return found, self._run


def find_repeats(token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the repeats of a whole sequence: token_ids [T] -> positions int64 [T, NUM_ORDERS], runs int64 [T]."""
    finder = RepeatFinder()
    found = [finder.feed(token_id) for token_id in token_ids.tolist()]
    positions = np.array([positions for positions, _ in found], np.int64).reshape(-1, NUM_ORDERS)
    return positions, np.array([run for _, run in found], np.int64)
