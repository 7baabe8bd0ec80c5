"""How long lost requests are tried again: waits that grow, until nothing has come for too long.

Knows time. Knows nothing of requests.
"""

import random
import threading
import time

from moeflow.errors import ModelSourceError
from moeflow.formatting import format_seconds
from moeflow.hub.refusals import LostError

PATIENCE_S = 300.0
_FIRST_S, _LONGEST_S = 0.25, 30.0


class Patience:
    """The waits of one request that is tried again.

    Args:
        what: is asked for.
        patience_s: how long nothing may come.
        stop: ends a wait.
    """

    def __init__(self, what: str, patience_s: float, stop: threading.Event) -> None:
        self._what, self._patience_s, self._stop = what, patience_s, stop
        self.came()

    def came(self) -> None:
        """Begin anew: something came."""
        self._tries, self._since_s = 0, time.monotonic()

    def wait(self, error: LostError) -> None:
        """Wait before the next try.

        Args:
            error: of the last.

        Raises:
            ModelSourceError: nothing has come for so long, or the server asks for a longer wait.
        """
        self._tries += 1
        wait_s = min(_LONGEST_S, _FIRST_S * 2 ** min(self._tries - 1, 10)) * random.uniform(0.75, 1.25)
        if error.retry_after_s is not None:
            wait_s = error.retry_after_s
        if time.monotonic() + wait_s - self._since_s > self._patience_s:
            asked = error.retry_after_s
            after = f", and asks to wait {format_seconds(asked)}" if asked and asked > self._patience_s else ""
            raise ModelSourceError(
                f"{self._what} could not be fetched: {error}{after} (tries: {self._tries}). Check the network and run "
                "it again: what was fetched is kept."
            ) from error
        self._stop.wait(wait_s)
