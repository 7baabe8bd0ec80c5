"""The time of each token that generate() gives out."""

import time


class TokenTimes:
    """A streamer that keeps the time of each token; the prompt comes first.

    Attributes:
        times: seconds of `time.perf_counter`, one of the prompt and one of each token.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, token_ids: object) -> None:
        """Take the prompt first, then every token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last token was put."""
