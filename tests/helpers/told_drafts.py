"""Drafts that a test says."""

from moeflow.engine.speculation.drafts import Draft
from moeflow.engine.speculation.speculation import SourceCounts


class Told:
    """Proposes what a test says.

    Args:
        propose: takes a sequence and the most tokens, returns a draft.
    """

    name = "told"
    costs = False

    def __init__(self, propose):
        self._propose = propose

    def propose(self, sequence, most):
        return self._propose(sequence, most)

    def saw(self, tokens, logits):
        """Nothing."""

    def forget(self, id):
        """Nothing."""


def always(token):
    """Proposes one token again and again."""
    return Told(lambda sequence, most: Draft((token,) * most, (0.5,) * most))


def likely_or_not(answers_by_prompt):
    """Proposes the answers' next tokens, with a wrong one in every third draft."""
    calls = [0]

    def propose(sequence, most):
        calls[0] += 1
        answer = answers_by_prompt[tuple(sequence.prompt_ids)]
        found = answer[len(sequence.token_ids) :][:most]
        if calls[0] % 3 == 0 and found:
            found[calls[0] % len(found)] = 2
        return Draft(tuple(found), (0.5,) * len(found))

    return Told(propose)


def use(engine, source):
    """Let an engine have one source."""
    engine._speculation._sources = [source]
    engine._speculation._counts = {source.name: SourceCounts()}
