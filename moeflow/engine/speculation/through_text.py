"""A draft model with other tokens: it reads the sequence's text, and what it says goes back through text."""

import math
from itertools import takewhile

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeflow.engine.sequence import Sequence
from moeflow.engine.speculation.draft_model import DraftModel
from moeflow.engine.speculation.draft_text import UNFINISHED, DraftText, text_behind
from moeflow.engine.speculation.drafts import NO_DRAFT, Draft, DraftSource
from moeflow.errors import ConfigError
from moeflow.hf.passes import forward

_MOST_OF_ITS_TOKENS = 4  # that the draft model says for each token of a draft


def draft_source(
    model: PreTrainedModel,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    own: PreTrainedTokenizerBase | None = None,
) -> DraftSource:
    """Return the source of a draft model's drafts: by its tokens where these are the same, else through text.

    Args:
        model: the draft model.
        vocab_size: tokens of the model that verifies.
        tokenizer: of the draft model; None where its tokens are known to be the same.
        own: of the model that verifies.

    Raises:
        ConfigError: it is no model, or has other tokens and a tokenizer is missing; the message says which.
        UnsupportedModelError: it keeps other state than keys and values.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"draft_model={model!r:.80} is no model: give one of transformers that is loaded, such as "
            "AutoModelForCausalLM.from_pretrained(...)."
        )
    if tokenizer is not None and own is not None:
        same = tokenizer.get_vocab() == own.get_vocab()
        return DraftModel(model, vocab_size) if same else ThroughText(model, tokenizer, own)
    size = forward.vocab_size(model)
    if size != vocab_size:
        missing = "draft_tokenizer=" if tokenizer is None else "the model's tokenizer to the engine"
        raise ConfigError(
            f"the draft model {type(model).__name__} has other tokens: it has {size} tokens and the model {vocab_size}."
            f" Give {missing}, so that its drafts go through text, give a model with the same tokens, or leave it out."
        )
    return DraftModel(model, vocab_size)


class ThroughText:
    """Proposes what a draft model with another tokenizer says, as far as it goes on with the sequence's own tokens.

    The tokens of the sequence's last word have to be the same with the text behind it. The draft model says one token
    more than is wanted, and of the tokens for its text those are proposed that are the same without it.

    Args:
        model: the draft model.
        tokenizer: its tokenizer.
        own: the tokenizer of the model that verifies.

    Raises:
        ConfigError: the tokenizer has more tokens than the draft model.
        UnsupportedModelError: the draft model keeps other state than keys and values.
    """

    name = DraftModel.name
    costs = True

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase
    ) -> None:
        size, known = len(tokenizer), forward.vocab_size(model)
        if size > known:
            raise ConfigError(
                f"draft_tokenizer has {size} tokens, and the draft model {type(model).__name__} knows {known}. Give "
                "the draft model's own tokenizer."
            )
        self._model = DraftModel(model, size)
        self._tokenizer, self._own = tokenizer, own
        self._special = frozenset(tokenizer.all_special_ids)
        self._texts: dict[str, DraftText] = {}

    def propose(self, sequence: Sequence, most: int) -> Draft:
        """Return what the model says behind a sequence's text, in the sequence's own tokens."""
        text = self._texts.get(sequence.id)
        if text is None:
            text = self._texts[sequence.id] = DraftText(self._own, self._tokenizer)
        ids = text.read(sequence)
        if not ids:
            return NO_DRAFT
        wanted = 1 + min(math.ceil(most * len(ids) / sequence.length), _MOST_OF_ITS_TOKENS * most)
        said = self._model.says(sequence.id, ids, wanted, self._special)
        texts = [text_behind(self._tokenizer, ids, list(said.tokens[:size])) for size in range(len(said.tokens) + 1)]
        ends = [(one or "").rstrip(UNFINISHED) for one in texts]
        tokens = text.tokens_of(ends[-1])
        if len(said.tokens) == wanted:  # its next one may belong to the same word
            sure = text.tokens_of(next((end for end in reversed(ends) if end != ends[-1]), ""))
            tokens = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, sure, strict=False))]
        tokens = tokens[:most]
        return Draft(tuple(tokens), _shared_out(said.probabilities, list(map(len, ends)), text.ends_of(tokens)))

    def saw(self, tokens: list[int], logits: torch.Tensor) -> None:
        """Nothing: the model says all."""

    def forget(self, id: str) -> None:
        """Drop a sequence's text and cache."""
        self._texts.pop(id, None)
        self._model.forget(id)


def _shared_out(probabilities: tuple[float, ...], begins: list[int], ends: list[int]) -> tuple[float, ...]:
    """Return the probability of each of some tokens: that of all draft's tokens which begin in it.

    Args:
        probabilities: of the draft's tokens.
        begins: of these, in letters.
        ends: of the tokens.
    """
    found, place = [], 0
    for end in ends:
        probability = 1.0
        while place < len(probabilities) and begins[place] < max(end, 1):
            probability *= probabilities[place]
            place += 1
        found.append(probability)
    return tuple(found)
