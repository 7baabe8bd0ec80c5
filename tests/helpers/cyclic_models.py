"""Models that say one text round and round, whatever their tokenizer, and tokenizers that cut it in other ways."""

from itertools import pairwise

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers.small_models import tiny_mixtral


def piece_tokenizer(pieces, **options):
    """One token a byte, and one for each piece, which are made from left to right."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges = []
    for piece in pieces:
        ((written, _),) = byte_level.pre_tokenize_str(piece)
        merges += [(written[:size], written[size]) for size in range(1, len(written))]
    merges = list(dict.fromkeys(merges))
    vocab = {token: number for number, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    made = Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer, made.decoder = byte_level, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, **options)


def trained_tokenizer(text, size, **options):
    """Of GPT-2's kind, with the pieces that are frequent in a text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, **options)


def cyclic(tokenizer, text, **options):
    """A Mixtral that says a text again and again, in a tokenizer's tokens for the text behind itself.

    Each of its tokens has one successor in it; behind any other it begins anew.
    """
    once, twice = (tokenizer(text * times, add_special_tokens=False)["input_ids"] for times in (1, 2))
    cycle = twice[len(once) :]
    successors = dict(pairwise([*cycle, cycle[0]]))
    assert len(successors) == len(cycle) <= 64, "a token has two successors, or one more than there are dimensions"
    model = tiny_mixtral(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down_proj" in name or "o_proj" in name:
                parameter.zero_()  # nothing but the last token's embedding reaches the head
        embeddings, head = model.get_input_embeddings().weight.zero_(), model.lm_head.weight.zero_()
        embeddings[:, len(cycle) - 1] = 1
        for place, (token, successor) in enumerate(successors.items()):
            embeddings[token] = torch.eye(64)[place]
            head[successor, place] = 1
    return model
