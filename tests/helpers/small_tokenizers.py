"""Tokenizers small enough for random models: one token a byte, or one a letter."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(**options):
    """One token a byte, as the smallest pieces of GPT-2's kind; options go to the tokenizer of transformers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=pieces, **options)


def letter_tokenizer(**options):
    """Token n is the letter of code n + 32, up to the tilde; what has no letter is read as a space."""
    letters = [chr(code) for code in range(32, 127)]
    pieces = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, [], unk_token=" "))
    pieces.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    pieces.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=pieces, **options)
