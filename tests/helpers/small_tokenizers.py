"""Tokenizers small enough for random models: one token a byte, one a letter, or of SentencePiece's kind."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
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


def sentencepiece_tokenizer(**options):
    """As Llama 2's: a space is a letter of its own, letters that are no token are their bytes; a few merged pieces."""
    merges = [("\u2581", "a"), ("n", "a"), ("m", "e"), ("na", "me"), ('"', ":"), ("\u2581", '"'), ("{", '"')]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += [chr(code) for code in range(33, 127)] + ["\u00fc", *(a + b for a, b in merges)]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    replaced = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(replaced)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **{**names, **options})
