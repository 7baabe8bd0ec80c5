"""How much of a batch is done, when nobody knows how long its answers will be."""

from collections import Counter


class BatchShare:
    """Counts tokens that are there, and guesses those to come.

    Args:
        most_tokens: the most tokens each id may get.
    """

    def __init__(self, most_tokens: dict[str, int]):
        self._most_tokens = most_tokens
        self._waiting = Counter(most_tokens.values())  # requests without a token, by the most they may get
        self._running: dict[str, int] = {}  # tokens that each of the others may still get
        self._num_answered = 0
        self.num_requests = len(most_tokens)
        self.num_tokens = self.num_ended = 0

    @property
    def done(self) -> float:
        """Share of the batch's tokens that are there, 0 to 1.

        A request is expected to get as many more tokens as the mean length, and no more than its maximum allows. The
        mean is all tokens over the answers that ended: so those under way count with what they have, and early enders
        do not make the batch look short.
        """
        if self.num_ended == self.num_requests:
            return 1.0
        mean = self.num_tokens / self._num_answered if self._num_answered else float("inf")
        num_left = sum(min(mean, most) * number for most, number in self._waiting.items())
        num_left += sum(min(mean, most) for most in self._running.values())
        return self.num_tokens / (self.num_tokens + num_left)

    def add(self, num_new: dict[str, int], ended: list[str]) -> None:
        """Count what came of a step.

        Args:
            num_new: new tokens of each id that got some.
            ended: ids that ended; one without a token has failed.
        """
        for name, number in num_new.items():
            if number:
                if name not in self._running:
                    self._running[name] = self._leave_waiting(name)
                self._running[name] -= number
                self.num_tokens += number
        for name in ended:
            if self._running.pop(name, None) is None:
                self._leave_waiting(name)
            else:
                self._num_answered += 1
        self.num_ended += len(ended)

    def _leave_waiting(self, name) -> int:
        most = self._most_tokens[name]
        self._waiting[most] -= 1
        return most
