"""The vocabulary in a GGUF file's metadata: tokens, what kind each is, the special ones, and those that end a text.

Knows keys of metadata. Knows nothing of how text is split.
"""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

from moeflow.errors import CheckpointError

Value = TypeVar("Value")
_REMEDY = "Download the file again, or give the folder of the model's own tokenizer.json (--config)."
# SentencePiece's own numbers, which llama.cpp takes where the file has none.
_DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}}
# llama.cpp ends a text at tokens of these names, whatever the file says of them.
_ENDS = frozenset(
    (
        "</s>", "<eos>", "[EOS]", "[EOT]", "<EOT>", "_<EOT>", "[e~[", "<turn|>", "<|tool_response>", "<end_of_turn>",
        "<end_of_utterance>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>",
        "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
    )
)  # fmt: skip
# A name that is no end where all of the others are there: gpt-oss's and Solar's parts of an answer, Gemma 4's text.
_NO_ENDS = (
    ("<|end|>", {"<|return|>", "<|call|>"}),
    ("<|end|>", {"<|return|>", "<|calls|>"}),
    ("<|end|>", {"<|flush|>", "<|call|>"}),
    ("<|end|>", {"<|flush|>", "<|calls|>"}),
    ("</s>", {"<|tool_response>"}),
)


class Kind(IntEnum):
    """What a token is, in the numbers of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Vocabulary(NamedTuple):
    """A vocabulary.

    Args:
        model: the tokenizer's kind, of `tokenizer.ggml.model`.
        tokens: each token's text as the file spells it, by id. Ids that fill up the embeddings are left out.
        kinds: each one's kind.
        special: ids of "bos", "eos", "eot", "eom", "unknown" and "padding", where they are known.
    """

    model: str
    tokens: dict[int, str]
    kinds: dict[int, Kind]
    special: dict[str, int]


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Read the vocabulary.

    Args:
        metadata: of the file. One without a tokenizer has a vocabulary without tokens, of the model "none".

    Raises:
        CheckpointError: a key is of another type, or does not fit the others.
    """
    model = field(metadata, "tokenizer.ggml.model", str, "none")
    words = strings(metadata, "tokenizer.ggml.tokens", [])
    numbers = field(metadata, "tokenizer.ggml.token_type", list, [])
    if numbers and len(numbers) != len(words):
        raise CheckpointError(
            f"tokenizer.ggml.token_type has {len(numbers)} entries for the {len(words)} of tokenizer.ggml.tokens. "
            + _REMEDY
        )
    known = set(Kind)
    tokens, kinds = {}, {}
    for i, word in enumerate(words):
        kind = Kind(numbers[i]) if numbers and numbers[i] in known else Kind.NORMAL
        if word and not (kind is Kind.UNUSED and word == f"[PAD{i}]"):  # llama.cpp's name of a row without a token
            tokens[i], kinds[i] = word, kind
    if len(set(tokens.values())) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.tokens names one token twice. {_REMEDY}")
    special = dict(_DEFAULT_IDS.get(model, {}))
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        number = field(metadata, f"tokenizer.ggml.{name}_token_id", int, special.get(name, -1))
        special.pop(name, None)
        if number in tokens:  # 4294967295 stands for none
            special[name] = number
    return Vocabulary(model, tokens, kinds, special)


def end_ids(vocabulary: Vocabulary) -> list[int]:
    """Return the ids at which a text ends, as llama.cpp finds them: the end of texts first, then the others in order.

    They are those that the file names as the end of a text, a turn or a message, and special tokens whose names are
    known to end one: most files name only one end, and a model may write another.
    """
    ids = {word: i for i, word in vocabulary.tokens.items()}
    ends = {ids[word] for word in _ENDS & set(ids) if vocabulary.kinds[ids[word]] is not Kind.NORMAL}
    ends |= {vocabulary.special[name] for name in ("eos", "eot", "eom") if name in vocabulary.special}
    words = {vocabulary.tokens[i] for i in ends}
    for word, others in _NO_ENDS:
        if word in words and others <= words:
            ends.discard(ids[word])
    first = vocabulary.special.get("eos")
    return sorted(ends, key=lambda i: (i != first, i))


def field(metadata: Mapping[str, Any], key: str, kind: type[Value], default: Value | None = None) -> Value:
    """Return a value of the metadata.

    Args:
        metadata: of the file.
        key: of the value.
        kind: its type.
        default: where the file has no such key; None where it must.

    Raises:
        CheckpointError: it is missing, or of another type.
    """
    value = metadata.get(key, default)
    if value is None:
        raise CheckpointError(f"the file's metadata has no {key}. {_REMEDY}")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise CheckpointError(f"{key} is {value!r:.80}, not of the type {kind.__name__}. {_REMEDY}")
    return value


def strings(metadata: Mapping[str, Any], key: str, default: list[str] | None = None) -> list[str]:
    """Return a list of texts of the metadata. Arguments and errors are those of `field`."""
    found = field(metadata, key, list, default)
    if not all(isinstance(text, str) for text in found):
        raise CheckpointError(f"{key} holds something other than texts. {_REMEDY}")
    return found
