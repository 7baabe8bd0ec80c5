"""Draft model: a smaller model answers first, and each of its tokens is a proposal.

Sources: Leviathan et al. 2023; Chen et al. 2023 (speculative decoding by a draft model).
"""

import math
from collections.abc import Collection

import torch
from transformers import PreTrainedModel

from moeflow.engine.sequence import Sequence
from moeflow.engine.speculation.drafts import NO_DRAFT, Draft
from moeflow.hf.passes import forward

_MOST_SEQUENCES = 4  # whose caches are kept


class DraftModel:
    """Proposes what another model says, greedily.

    Args:
        model: any causal LM whose cache holds keys and values only.
        vocab_size: its tokens that have a meaning.

    Raises:
        UnsupportedModelError: its cache holds other state.
    """

    name = "draft_model"
    costs = True

    def __init__(self, model: PreTrainedModel, vocab_size: int) -> None:
        forward.check_key_value_cache(model)
        self._model, self._vocab_size = model, vocab_size
        self._caches: dict[str, tuple[list[int], forward.KeyValueCache]] = {}  # tokens that each covers; latest last

    def propose(self, sequence: Sequence, most: int) -> Draft:
        """Return what the model says behind a sequence, token by token."""
        return self.says(sequence.id, sequence.tokens_from(0), most)

    def says(self, id: str, ids: list[int], most: int, ends: Collection[int] = ()) -> Draft:
        """Return what the model says behind tokens, at most as many as its context has room for.

        Args:
            id: of the sequence, whose cache is kept.
            ids: tokens of the model, at least one.
            most: of the draft.
            ends: tokens before which the draft ends.

        Raises:
            ValueError: the model says what is no probability.
        """
        context = forward.context_positions(self._model)
        if context is not None:
            most = min(most, context - len(ids))
        if most <= 0:
            return NO_DRAFT
        covered, cache = self._caches.pop(id, ([], None))
        if cache is None:
            cache = forward.new_cache()
        common = next((i for i, (a, b) in enumerate(zip(covered, ids, strict=False)) if a != b), len(covered))
        common = min(common, len(ids) - 1)
        if common < len(covered):
            cache.crop(common - len(covered))  # negative: so many positions go
        tokens: list[int] = []
        probabilities: list[float] = []
        new = ids[common:]
        while len(tokens) < most:
            logits = self._logits(new, cache)
            best = int(logits.argmax())
            probability = float(logits.softmax(-1)[best])
            if math.isnan(probability):
                raise ValueError("the draft model's probabilities are no numbers")
            if best >= self._vocab_size or best in ends:  # one of its own padding
                break
            tokens.append(best)
            probabilities.append(probability)
            new = [best]
        self._caches[id] = ids + tokens[: len(tokens) - 1 if len(tokens) == most else None], cache
        while len(self._caches) > _MOST_SEQUENCES:
            del self._caches[next(iter(self._caches))]
        return Draft(tuple(tokens), tuple(probabilities))

    def _logits(self, new: list[int], cache: forward.KeyValueCache) -> torch.Tensor:
        ids = torch.tensor([new], device=self._model.device)
        with torch.no_grad():
            made = self._model(input_ids=ids, use_cache=True, **forward.cache_argument(self._model, cache))
        return made.logits[0, -1].float()

    def saw(self, tokens: list[int], logits: torch.Tensor) -> None:
        """Nothing: the model says all."""

    def forget(self, id: str) -> None:
        """Drop a sequence's cache."""
        self._caches.pop(id, None)
