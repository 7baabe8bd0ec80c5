"""From a GGUF file's metadata to a tokenizer of transformers: byte-level BPE, SentencePiece's BPE and Gemma 4's.

Built with the library tokenizers, and not by transformers' own reader of GGUF: that one knows fewer kinds of splits and
takes any other as GPT-2's, spells special tokens in bytes where they have letters beyond ASCII (DeepSeek's), and gives
no regard to `add_bos_token` or to words that are taken whole. Tests compare both where they agree.

Knows metadata and the library tokenizers. Knows nothing of GGUF's bytes or of caches.
"""

import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moeflow.errors import CheckpointError, MoeflowError, UnsupportedModelError
from moeflow.hf.gguf.text_splits import SPLITS, Split
from moeflow.hf.gguf.vocabulary import Kind, Vocabulary, field, read_vocabulary, strings
from moeflow.hf.wall import one_line, wall

SPACE = "\u2581"
_REMEDY = "Put the model's own tokenizer.json beside the file, or give the folder it lies in (--config)."
_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_TEMPLATE = "tokenizer.chat_template"


def build_tokenizer(metadata: Mapping[str, Any], own: Path | None = None) -> PreTrainedTokenizerFast:
    """Build the tokenizer that a file describes.

    Its chat templates are as the file has them, right or wrong: whoever renders one is told (see `hf.encoding`), and
    what needs none goes on.

    Args:
        metadata: of the file.
        own: the model's own tokenizer.json, in place of the file's tokens. Special ones are named as the file has it.

    Raises:
        CheckpointError: a key is missing or wrong, or the tokens and merges do not fit each other.
        UnsupportedModelError: a kind of tokenizer, or of splitting text, that is not known; the name is told.
    """
    vocabulary = read_vocabulary(metadata)
    source = "the file's tokens and merges" if own is None else str(own)

    def tell(error: BaseException) -> MoeflowError:
        return CheckpointError(f"{source} cannot be made a tokenizer ({one_line(error)}). {_REMEDY}")

    with wall(tell):
        made = _of_metadata(vocabulary, metadata) if own is None else Tokenizer.from_file(str(own))
        spelled = _spelled(vocabulary)
        options: dict[str, Any] = {"clean_up_tokenization_spaces": False}
        for option, name in _NAMES.items():
            number = vocabulary.special.get(name, -1)
            if number in spelled and made.token_to_id(spelled[number]) == number:
                options[option] = spelled[number]
        length = f"{metadata.get('general.architecture')}.context_length"
        if length in metadata:
            options["model_max_length"] = field(metadata, length, int)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **options)
    tokenizer.chat_template = chat_templates(metadata)
    return tokenizer


def chat_templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Return the chat template, several with their names, or None.

    Raises:
        CheckpointError: one is no text, or its name could not be a file's.
    """
    found = {"default": field(metadata, _TEMPLATE, str)} if _TEMPLATE in metadata else {}
    for name in strings(metadata, "tokenizer.chat_templates", []):
        if not re.fullmatch(r"\w[\w-]{0,63}", name):
            raise CheckpointError(
                f"tokenizer.chat_templates holds the name {name!r:.80}; a name has letters, digits and '-' alone. "
                f"{_REMEDY}"
            )
        found[name] = field(metadata, f"{_TEMPLATE}.{name}", str)
    return found if found.keys() - {"default"} else found.get("default")


def _of_metadata(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> Tokenizer:
    if vocabulary.model not in ("gpt2", "llama", "gemma4"):
        raise UnsupportedModelError(
            f"the file's tokenizer is of the kind {vocabulary.model!r} (tokenizer.ggml.model); moeflow reads gpt2, "
            f"llama and gemma4. {_REMEDY}"
        )
    strings(metadata, "tokenizer.ggml.tokens")
    build = _byte_level if vocabulary.model == "gpt2" else _spaces_as_letters
    made, adds_bos = build(vocabulary, metadata)
    _add_tokens(made, vocabulary, strips=metadata.get("general.architecture") == "phimoe")
    _frame(made, vocabulary, metadata, adds_bos)
    return made


def _byte_level(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, as GPT-2's; and whether it begins texts with a token where the file does not say."""
    split = _split(metadata)
    made = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in vocabulary.tokens.items()},
            merges=_merges(vocabulary, metadata),
            ignore_merges=split.whole_words,
        )
    )
    if split.composes:
        made.normalizer = normalizers.NFC()
    words = [pre_tokenizers.Split(Regex(regex), behavior="isolated") for regex in split.regexes]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*words, last])
    made.decoder = decoders.ByteLevel()
    return made, split.adds_bos


def _split(metadata: Mapping[str, Any]) -> Split:
    kind = field(metadata, "tokenizer.ggml.pre", str, "default")
    if kind not in SPLITS:
        stated = f"splits text in the way {kind!r}" if "tokenizer.ggml.pre" in metadata else "does not say how"
        raise UnsupportedModelError(
            f"the file {stated} (tokenizer.ggml.pre), and a wrong split would give wrong tokens without a sign of it. "
            f"moeflow knows {', '.join(sorted(SPLITS))}. {_REMEDY}"
        )
    return SPLITS[kind]


def _spaces_as_letters(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    """SentencePiece's BPE: a space is a letter of its own, and what is no token is its bytes."""
    is_llama = vocabulary.model == "llama"
    spelled = _spelled(vocabulary)
    vocab = {word: i for i, word in spelled.items()}
    if len(vocab) != len(spelled):
        raise CheckpointError(f"two tokens of the file are the same number of spaces. {_REMEDY}")
    unknown = vocabulary.special.get("unknown")
    has_merges = bool(metadata.get("tokenizer.ggml.merges")) or not is_llama
    made = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(vocabulary, metadata) if has_merges else _scored_merges(vocabulary, metadata),
            unk_token=None if unknown is None else spelled[unknown],
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    prefixes = field(metadata, "tokenizer.ggml.add_space_prefix", bool, is_llama)
    replaced = normalizers.Replace(" ", SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replaced]) if prefixes else replaced
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixes else steps)
    return made, is_llama


def _spelled(vocabulary: Vocabulary) -> dict[int, str]:
    """Return the tokens as the tokenizer has them: in SentencePiece's, llama.cpp's converter wrote runs of the space's
    letter, where they are tokens that users defined, as plain spaces."""
    if vocabulary.model == "gpt2":
        return vocabulary.tokens
    return {i: SPACE * len(word) if not word.strip(" ") else word for i, word in vocabulary.tokens.items()}


def _merges(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Read the merges: two pieces with a space between; the first letter may be a space itself.

    Only a vocabulary of single letters may lack them.
    """
    words = (word for i, word in vocabulary.tokens.items() if vocabulary.kinds[i] is Kind.NORMAL)
    needs_none = all(len(word) == 1 for word in words)
    pairs = []
    for merge in strings(metadata, "tokenizer.ggml.merges", [] if needs_none else None):
        cut = merge.find(" ", 1)
        if cut < 0:
            raise CheckpointError(f"tokenizer.ggml.merges holds {merge!r:.80}, which is no pair. {_REMEDY}")
        pairs.append((merge[:cut], merge[cut + 1 :]))
    return pairs


def _scored_merges(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Derive merges from scores: SentencePiece always makes the token of the best score of two neighbours."""
    scores = field(metadata, "tokenizer.ggml.scores", list)
    words = {
        word: i
        for i, word in _spelled(vocabulary).items()
        if vocabulary.kinds[i] in (Kind.NORMAL, Kind.UNUSED) or not word.strip(SPACE)
    }
    if any(i >= len(scores) for i in words.values()):
        raise CheckpointError(f"tokenizer.ggml.scores has {len(scores)} entries, and there are more tokens. {_REMEDY}")
    long = [i for word, i in words.items() if len(word) > 1]
    if len(long) > 1 and len({scores[i] for i in long}) == 1:  # a converter's stand-in for scores it had not
        raise UnsupportedModelError(
            f"the file has no merges, and one score for all tokens, so that nothing tells how words are cut. {_REMEDY}"
        )
    pairs = (
        (-scores[i], i, word[:cut], word[cut:])
        for word, i in words.items()
        for cut in range(1, len(word))
        if word[:cut] in words and word[cut:] in words
    )
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _add_tokens(made: Tokenizer, vocabulary: Vocabulary, *, strips: bool) -> None:
    """Make tokens that text is searched for: special ones, and those that users defined, which are plain text.

    `strips`: special ones eat the spaces behind them, as Phi 3's do, which no file says.
    """
    special, plain = [], []
    for i, word in _spelled(vocabulary).items():
        kind = vocabulary.kinds[i]
        if kind in (Kind.CONTROL, Kind.UNKNOWN):
            after = strips and word not in ("<unk>", "<s>", "<|endoftext|>")
            special.append(AddedToken(word, normalized=False, special=True, rstrip=after))
        elif kind is Kind.USER_DEFINED:
            plain.append(AddedToken(word, normalized=False, special=False))
    made.add_special_tokens(special)
    made.add_tokens(plain)


def _frame(made: Tokenizer, vocabulary: Vocabulary, metadata: Mapping[str, Any], adds_bos: bool) -> None:
    """Let texts begin and end with the tokens that the file says."""
    around = []
    for name, default in (("bos", adds_bos), ("eos", False)):
        adds = field(metadata, f"tokenizer.ggml.add_{name}_token", bool, default and name in vocabulary.special)
        if name == "bos" and vocabulary.model == "gemma4":
            adds = False  # the flag is set, but the model's own tokenizer leaves it to the chat template
        if adds and name not in vocabulary.special:
            raise CheckpointError(
                f"tokenizer.ggml.add_{name}_token is true, and no tokenizer.ggml.{name}_token_id is there. {_REMEDY}"
            )
        around.append([_spelled(vocabulary)[vocabulary.special[name]]] if adds else [])
    if any(around):
        (before, after), ids = around, {word: made.token_to_id(word) for word in chain.from_iterable(around)}
        made.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{word}:1" for word in before), "$B:1", *(f"{word}:1" for word in after)],
            special_tokens=[(word, ids[word]) for word in ids],
        )
