"""Draft model: a smaller model with the same tokens answers first, and each of its tokens is a proposal.

Sources: Leviathan et al. 2023; Chen et al. 2023 (speculative decoding by a draft model).
"""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeflow.engine.sequence import Sequence
from moeflow.engine.speculation.drafts import NO_DRAFT, Draft
from moeflow.errors import ConfigError
from moeflow.hf.passes import forward

_MOST_SEQUENCES = 4  # whose caches are kept


class DraftModel:
    """Proposes what another model says, greedily.

    Args:
        model: any causal LM whose cache holds keys and values only.
        vocab_size: tokens of the model that verifies.
        tokenizer: of the draft model; None where its tokens are known to be the same.
        target_tokenizer: of the model that verifies.

    Raises:
        ConfigError: it is no such model, or its tokens are others; the message says what differs.
    """

    name = "draft_model"
    costs = True

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        target_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        forward.check_key_value_cache(model)
        _check_tokens(model, vocab_size, tokenizer, target_tokenizer)
        self._model, self._vocab_size = model, vocab_size
        self._caches: dict[str, tuple[list[int], forward.KeyValueCache]] = {}  # tokens that each covers; latest last

    def propose(self, sequence: Sequence, most: int) -> Draft:
        """Return what the model says behind a sequence, token by token."""
        context = forward.context_positions(self._model)
        if context is not None:
            most = min(most, context - sequence.length)
        if most <= 0:
            return NO_DRAFT
        ids = sequence.tokens_from(0)
        covered, cache = self._caches.pop(sequence.id, ([], None))
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
            if best >= self._vocab_size:  # one of its own padding
                break
            tokens.append(best)
            probabilities.append(float(logits.softmax(-1)[best]))
            new = [best]
        self._caches[sequence.id] = ids + tokens[: len(tokens) - 1 if len(tokens) == most else None], cache
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


def _check_tokens(
    model: PreTrainedModel,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase | None,
    target_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Refuse a draft model with other tokens.

    Raises:
        ConfigError: names the model, and a token that differs.
    """
    own, name = forward.vocab_size(model), type(model).__name__
    differs = None
    if tokenizer is not None and target_tokenizer is not None:
        ours, theirs = target_tokenizer.get_vocab(), tokenizer.get_vocab()
        found = min(ours.items() ^ theirs.items(), key=lambda item: item[1], default=None)
        if found is not None:
            text = found[0]
            differs = f"{text!r} is token {ours.get(text)} of the model's tokenizer, and {theirs.get(text)} of its own"
    elif own != vocab_size:
        differs = f"it has {own} tokens and the model {vocab_size}"
    if differs is not None:
        raise ConfigError(
            f"the draft model {name} has other tokens: {differs}. Give one with the same tokenizer, or leave it out."
        )
