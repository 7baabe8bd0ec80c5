"""Stop strings: found across tokens; text that may become one is held back.

Knows the detokenizer. Knows nothing of models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeflow.engine.detokenizer import Detokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Turns the tokens of one answer into text, up to the first stop string.

    The stop string that is complete first ends the text, and of those complete at the same character the longest; so
    the text does not depend on how it is cut into tokens.

    Args:
        tokenizer: the model's.
        stop: texts that end the answer, none empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = ()) -> None:
        self.stopped = False
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""

    def push(self, token_id: int) -> tuple[str, bool]:
        """Take the next token.

        Returns:
            The text that is now safe to show, and whether a stop string has ended the answer; later tokens add nothing.
        """
        if not self.stopped:
            self._held += self._detokenizer.push([token_id])
        return self._release(), self.stopped

    def finish(self) -> str:
        """Return the rest of the text, where no stop string ended it before."""
        if self.stopped:
            return ""
        self._held += self._detokenizer.finish()
        text = self._release()
        if not self.stopped:
            text += self._held
        self._held = ""
        return text

    def _release(self) -> str:
        """Return the part of the held text that no further text can take back, and keep the rest."""
        begins = [(self._held.find(stop), stop) for stop in self._stop]
        found = [(begin + len(stop), begin) for begin, stop in begins if begin >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)[1]], ""
            return text
        begin = max(0, len(self._held) - self._longest + 1)
        while begin < len(self._held) and not any(stop.startswith(self._held[begin:]) for stop in self._stop):
            begin += 1
        text, self._held = self._held[:begin], self._held[begin:]
        return text
