"""The tokens that a model is compared on: of a text, or of one that every machine has.

Knows tokenizers. Knows nothing of experts.
"""

from pathlib import Path

from moeflow.calibration.sample_texts import library_texts
from moeflow.errors import ConfigError
from moeflow.hf import pretrained
from moeflow.hf.encoding import encode_text

_ROW_TOKENS = 256


def token_rows(folder: Path, text: str | list[list[int]] | None, num_tokens: int) -> list[list[int]]:
    """Return rows of token ids, all of one length.

    Args:
        folder: of the model, for its tokenizer.
        text: whose beginning is taken; or the rows themselves; None takes the Python standard library's.
        num_tokens: of all rows, at most; whole rows are taken.

    Raises:
        ConfigError: no tokens, or rows of different lengths.
        CheckpointError: the folder has no tokenizer.
    """
    if num_tokens < 1:
        raise ConfigError(f"tokens is {num_tokens}. Give 1 or more.")
    if isinstance(text, list):
        if len({len(row) for row in text}) != 1 or not text[0]:
            raise ConfigError("rows of token ids must be of one length, and not empty.")
        return text
    length = min(num_tokens, _ROW_TOKENS)
    tokenizer = pretrained.load_tokenizer(folder)
    if text is None:
        rows = library_texts(tokenizer, num_tokens // length * length, length)
    else:
        ids = encode_text(tokenizer, text)[:num_tokens]
        length = min(length, len(ids))
        rows = [ids[begin : begin + length] for begin in range(0, len(ids) - length + 1, length)] if ids else []
    if not rows:
        raise ConfigError("the text has no token. Give one that has some: a few sentences are enough.")
    return rows
