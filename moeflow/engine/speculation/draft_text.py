"""The text of a sequence in the tokens of a draft's tokenizer, and text that follows it in the sequence's own tokens.

Knows tokenizers. Knows nothing of models.
"""

from transformers import PreTrainedTokenizerBase

from moeflow.engine.sequence import Sequence
from moeflow.engine.text.detokenizer import Detokenizer

_LONG_TEXT = 256  # letters that are encoded at each step, from which on the first of them are settled
_REST = 32  # letters that stay unsettled at least
_MOST_CUTS = 4  # places that are tried at a time
_WORD_TOKENS = 16  # of the sequence's own, among which the beginning of the last word is looked for
_CONTEXT_TOKENS = 4  # before some tokens, which say how the first of them reads
_BEFORE = "\n"  # stands before a text that is no beginning: SentencePiece's kinds put a space before a beginning
UNFINISHED = "\ufffd"
"""What half a character reads as."""


def text_behind(tokenizer: PreTrainedTokenizerBase, context: list[int], tokens: list[int]) -> str | None:
    """Return the text of tokens behind others, of which the last few count; None where it changes theirs."""
    context = context[-_CONTEXT_TOKENS:]
    before, text = _decode(tokenizer, context), _decode(tokenizer, context + tokens)
    return text[len(before) :] if text.startswith(before) else None


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _encode_within(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text that stands behind another one."""
    before, tokens = _encode(tokenizer, _BEFORE), _encode(tokenizer, _BEFORE + text)
    return tokens[len(before) :] if tokens[: len(before)] == before else _encode(tokenizer, text)


class DraftText:
    """One sequence's text in the tokens of a draft's tokenizer, and back.

    Each new token of the sequence is decoded once. Of the text, only what is not settled is encoded at each step. A cut
    in front of a word settles what is before it, where the tokens of both sides are those of the whole; a text without
    such a cut is encoded as a whole until it is twice as long.

    Special tokens cut the text. The sequence's first and last one are those of the draft's tokenizer; others stand as
    they are written.

    Args:
        own: the sequence's tokenizer.
        draft: the draft's.
    """

    def __init__(self, own: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
        self._own, self._draft = own, draft
        self._special = set(own.all_special_ids)
        self._num_read = 0
        self._last: list[int] = []  # the last of the sequence's own tokens behind a special one
        self._detokenizer = Detokenizer(own, skip_special_tokens=False)
        first = list(draft("a", verbose=False)["input_ids"][:1])
        self._settled = first if first == [draft.bos_token_id] else []
        self._within = False  # whether a text stands before what is not settled
        self._text = ""  # that is not settled
        self._long = _LONG_TEXT

    def read(self, sequence: Sequence) -> list[int]:
        """Take in a sequence's new tokens; return all its text in the draft's, without half a character at its end."""
        run: list[int] = []
        for token in sequence.tokens_from(self._num_read):
            if token in self._special:
                self._take(run, final=True)
                self._take_special(token, is_first=self._num_read == 0)
                run = []
            else:
                run.append(token)
            self._num_read += 1
        self._take(run, final=False)
        if len(self._text) > self._long:
            self._settle()
        return self._settled + self._encode(self._text + self._detokenizer.pending.rstrip(UNFINISHED))

    def tokens_of(self, text: str) -> list[int]:
        """Return the sequence's own tokens for a text behind all that was read.

        Returns:
            None where the tokens of the last word would be others with this text behind it.
        """
        for size in range(1, min(len(self._last), _WORD_TOKENS) + 1):
            word = text_behind(self._own, self._last[:-size], self._last[-size:])
            if word is not None and word[:1] == " " and word[1:2].strip():
                break
        else:
            size = min(len(self._last), _WORD_TOKENS)
            word = text_behind(self._own, self._last[: len(self._last) - size], self._last[len(self._last) - size :])
        known = self._last[len(self._last) - size :]
        tokens = _encode_within(self._own, (word or "").rstrip(UNFINISHED) + text)
        return tokens[len(known) :] if tokens[: len(known)] == known else []

    def ends_of(self, tokens: list[int]) -> list[int]:
        """Return where each of the sequence's own tokens ends, in letters behind all that was read."""
        texts = (text_behind(self._own, self._last, tokens[: place + 1]) for place in range(len(tokens)))
        return [len((text or "").rstrip(UNFINISHED)) for text in texts]

    def _take(self, tokens: list[int], *, final: bool) -> None:
        self._last = (self._last + tokens)[-_WORD_TOKENS - _CONTEXT_TOKENS :]
        self._text += self._detokenizer.push(tokens)
        if final:
            self._text += self._detokenizer.finish()

    def _take_special(self, token: int, *, is_first: bool) -> None:
        self._last, self._detokenizer = [], Detokenizer(self._own, skip_special_tokens=False)
        own, draft = self._own, self._draft
        if is_first and token == own.bos_token_id and self._settled:
            return
        same = {own.bos_token_id: draft.bos_token_id, own.eos_token_id: draft.eos_token_id}.get(token)
        if same is None:
            self._text += _decode(own, [token])
        else:
            self._settled = [*self._settled, *self._encode(self._text), same]
            self._text, self._within = "", True

    def _encode(self, text: str) -> list[int]:
        return _encode_within(self._draft, text) if self._within else _encode(self._draft, text)

    def _settle(self) -> None:
        whole, end = self._encode(self._text), len(self._text) - _REST
        self._long = 2 * len(self._text)
        for _ in range(_MOST_CUTS):
            end = self._text.rfind(" ", 1, end)
            if end < 0:
                return
            before, behind = self._text[:end], self._text[end:]
            tokens = self._encode(before)
            if tokens + _encode_within(self._draft, behind) == whole:
                self._settled = self._settled + tokens
                self._text, self._within, self._long = behind, True, _LONG_TEXT
                return
