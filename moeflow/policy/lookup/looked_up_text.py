"""A text that grows, and what followed its end where that occurred before.

Source: Saxena 2023, "Prompt Lookup Decoding"; with any length of match, as in "SAM Decoding" (Hu et al. 2024).
"""

from moeflow.policy.lookup.suffix_automaton import SuffixAutomaton

_LEAST_MATCH = 2  # tokens; a shorter one says little
_MOST_TOKENS = 1 << 15  # of a text; a longer one goes on with its last half
_HALF_SURE = 3  # length of a match behind which the next token is as likely as not the same


class LookedUpText:
    """Tokens of one text, read as they come.

    Attributes:
        num_read: tokens that were read.
    """

    def __init__(self) -> None:
        self.num_read = 0
        self._automaton = SuffixAutomaton()

    def read(self, tokens: list[int]) -> None:
        """Take in the text's next tokens."""
        self.num_read += len(tokens)
        if len(self._automaton.text) + len(tokens) > _MOST_TOKENS:
            whole = self._automaton.text + tokens
            tokens = whole if len(whole) <= _MOST_TOKENS else whole[-_MOST_TOKENS // 2 :]
            self._automaton = SuffixAutomaton()
        for token in tokens:
            self._automaton.append(token)

    def behind(self, most: int) -> tuple[list[int], float]:
        """Return what followed the longest match; where that reaches the end of the text, it goes round.

        Args:
            most: of the tokens.

        Returns:
            So many tokens, or none without a match; and how likely each of them is, where those before it came.
        """
        length, place = self._automaton.longest()
        if length < _LEAST_MATCH:
            return [], 0.0
        text, tokens = self._automaton.text, list[int]()
        for at in range(place, place + most):
            tokens.append(text[at] if at < len(text) else tokens[at - len(text)])
        return tokens, length / (length + _HALF_SURE)
