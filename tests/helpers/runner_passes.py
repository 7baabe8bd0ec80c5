"""A sequence whose logits a model runner computes pass by pass."""

import torch

from moeflow.engine.model_runner import ModelRunner
from moeflow.engine.sequence import Piece


class Passes:
    """A sequence whose logits a runner computes pass by pass."""

    def __init__(self, model, prompt, **options):
        self.runner = ModelRunner(model, 1 << 26, **options)
        self.sequence = self.runner.sequence("one", prompt, 200)
        assert self.runner.memory.admit(self.sequence)

    def begin(self, most):
        """Compute the prompt in pieces of so many tokens; logits [1, V]."""
        while self.sequence.length > self.sequence.num_computed:
            logits = self.run(most=most)
        return logits

    def run(self, draft=(), most=1000):
        """Compute what is uncomputed, at most so many, and a draft behind it; logits [1 + draft, V]."""
        assert self.runner.memory.grow(self.sequence)
        new = self.sequence.uncomputed(most)
        (computed,) = self.runner.run([Piece(self.sequence, new, True, draft)])
        assert computed.error is None, computed.error
        self.sequence.num_computed += len(new)
        return computed.logits

    def say(self, words):
        """Go on with these tokens; logits [words, V] behind each."""
        made = []
        for word in words:
            self.sequence.append(word)
            made.append(self.run())
        return torch.cat(made)
