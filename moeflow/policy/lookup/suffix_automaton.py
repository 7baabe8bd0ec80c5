"""Suffix automaton: the longest end of a text that occurred in it before, a few operations for each new token.

Source: Blumer et al. 1985 (the automaton, built online); Hu et al. 2024, "SAM Decoding" (its use for drafts).
"""

_MOST_MARKED = 16  # states whose last place is noted for a token, so that its cost is bounded


class SuffixAutomaton:
    """The automaton of one text, which grows at its end.

    A state stands for the substrings that end at the same places. Its link is the state of the longest end of these
    that ends at other places too, so the link of the whole text is its longest end that occurred before. There are at
    most twice as many states as tokens.

    Attributes:
        text: its tokens.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]  # of the longest substring of each state
        self._place = [0]  # behind an occurrence that is known, the latest where it was noted
        self._last = 0
        self._found = 0, 0

    @property
    def num_states(self) -> int:
        """States that there are."""
        return len(self._length)

    def append(self, token: int) -> None:
        """Add a token to the text."""
        self.text.append(token)
        size = len(self.text)
        new = self._add({}, size, size)
        state = self._last
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        if state < 0:
            self._link[new] = 0
        else:
            target = self._next[state][token]
            if self._length[target] != self._length[state] + 1:
                target = self._clone(target, state, token)
            self._link[new] = target
        self._last = new
        longest = self._link[new]
        self._found = self._length[longest], self._place[longest]
        for _ in range(_MOST_MARKED):
            if longest <= 0:
                break
            self._place[longest] = size
            longest = self._link[longest]

    def longest(self) -> tuple[int, int]:
        """Return the length of the longest end of the text that occurred before, and the place behind it.

        The place is one of an earlier occurrence, as a rule the latest; 0, 0 where nothing occurred before.
        """
        return self._found if self._found[0] else (0, 0)

    def _add(self, after: dict[int, int], length: int, place: int) -> int:
        self._next.append(after)
        self._link.append(-1)
        self._length.append(length)
        self._place.append(place)
        return len(self._length) - 1

    def _clone(self, target: int, state: int, token: int) -> int:
        """Part the shorter substrings of a state from its longer ones, which end at fewer places."""
        clone = self._add(dict(self._next[target]), self._length[state] + 1, self._place[target])
        self._link[clone] = self._link[target]
        self._link[target] = clone
        while state >= 0 and self._next[state].get(token) == target:
            self._next[state][token] = clone
            state = self._link[state]
        return clone
