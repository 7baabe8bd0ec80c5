"""Stop strings: found across tokens; text that may become one is held back.

Knows the detokenizer. Knows nothing of models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from moeflow.engine.text.detokenizer import Detokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"  # what half a character reads as


class _Unit(NamedTuple):
    """The text of a few tokens.

    Args:
        written: with special tokens; stop strings are looked for in it.
        shown: without them. It ends where `written` ends; at its beginning it may lack a space.
    """

    written: str
    shown: str

    def split(self, place: int) -> tuple[str, _Unit]:
        """Return what is shown of the first `place` characters, and the rest."""
        rest = self.written[place:]
        begin = max(0, len(self.shown) - len(rest))
        return self.shown[:begin], _Unit(rest, self.shown[begin:])


class StopStrings:
    """Turns the tokens of one answer into text, up to the first stop string.

    The stop string that is complete first ends the text, and of those complete at the same character the longest; so
    the text does not depend on how it is cut into tokens. As in `generate`, special tokens count as they are written,
    and a stop string may begin in the prompt. The text shows no special token.

    Args:
        tokenizer: the model's.
        stop: texts that end the answer, none empty.
        prompt_ids: the prompt's tokens.
        skip_special_tokens: whether special tokens are not shown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: tuple[str, ...] = (),
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self.found: str | None = None  # the stop string that ended the answer
        self._shown = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._written = Detokenizer(tokenizer, skip_special_tokens=False)
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held: list[_Unit] = []
        self._open = _Unit("", "")  # text since the last place at which both detokenizers had nothing pending
        self._prompt_ids: Sequence[int] = prompt_ids  # until the first token has come
        self._num_prompt = 0  # characters of the prompt in the held text

    def push(self, token_id: int, *, visible: bool = True) -> tuple[str, bool]:
        """Take the next token.

        Args:
            token_id: the token.
            visible: whether its text is part of the answer; that of an end-of-sequence token is not.

        Returns:
            The text that is now safe to show, and whether a stop string has ended the answer; later tokens add nothing.
        """
        if self.found is not None:
            return "", True
        shown = self._shown.push([token_id]) if visible else ""
        if not self._stop:
            return shown, False
        self._read_prompt()
        self._add(self._written.push([token_id]), shown)
        return self._release(self._written.pending.rstrip(_UNFINISHED)), self.found is not None

    def finish(self) -> str:
        """Return the rest of the text, where no stop string ended it before."""
        if self.found is not None:
            return ""
        if not self._stop:
            return self._shown.finish()
        text = self._release(self._written.pending)
        if self.found is None:
            text += "".join(unit.shown for unit in self._held) + self._open.shown + self._shown.finish()
        self._held, self._open = [], _Unit("", "")
        return text

    def _read_prompt(self) -> None:
        """Take the end of the prompt, in which a stop string may begin: at most a token for each byte."""
        if self._prompt_ids:
            most = max(len(stop.encode(errors="replace")) for stop in self._stop)
            self._add(self._written.push(list(self._prompt_ids[-most - 1 :])), "")
            self._prompt_ids = ()
            whole = self._written.pending.rstrip(_UNFINISHED)
            self._num_prompt = sum(len(unit.written) for unit in (*self._held, self._open)) + len(whole)

    def _add(self, written: str, shown: str) -> None:
        self._open = _Unit(self._open.written + written, self._open.shown + shown)
        if not self._written.pending and not self._shown.pending:
            if self._open.written or self._open.shown:
                self._held.append(self._open)
            self._open = _Unit("", "")

    def _release(self, pending: str) -> str:
        """Return the part of the held text that no further text can take back, and keep the rest.

        Args:
            pending: text behind the held one that is certain though not yet out.
        """
        written = "".join(unit.written for unit in self._held) + self._open.written + pending
        # A stop string that lies in the prompt alone is none of the answer's.
        begins = [(written.find(stop, max(0, self._num_prompt - len(stop) + 1)), stop) for stop in self._stop]
        found = [(begin + len(stop), begin) for begin, stop in begins if begin >= 0]
        if found:
            end, begin = min(found)
            self.found = written[begin:end]
            self._held.append(
                _Unit(self._open.written + self._written.pending, self._open.shown + self._shown.finish())
            )
            text = self._take(begin)
            self._held, self._open = [], _Unit("", "")
            return text
        begin = max(0, len(written) - self._longest + 1)
        while begin < len(written) and not any(stop.startswith(written[begin:]) for stop in self._stop):
            begin += 1
        return self._take(begin)

    def _take(self, place: int) -> str:
        """Return what is shown of the first `place` held characters, and hold the rest."""
        text = ""
        while self._held and place:
            unit = self._held.pop(0)
            shown, rest = unit.split(place)
            text += shown
            taken = len(unit.written) - len(rest.written)
            place -= taken
            self._num_prompt = max(0, self._num_prompt - taken)
            if rest.written:
                self._held.insert(0, rest)
        return text
