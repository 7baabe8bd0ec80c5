"""Checks of a model's tokenizer and chat template, each by a trial.

Knows texts. Knows nothing of weights.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from moeflow.doctor.finding import BROKEN, HARMFUL, Finding
from moeflow.errors import MoeflowError
from moeflow.formatting import brief
from moeflow.hf.encoding import encode_messages, encode_text
from moeflow.hf.pretrained import load_tokenizer

PROMPT = "The capital of France is"
_DOWNLOAD = "download the tokenizer's files again"


def check_tokenizer(folder: Path, vocab_size: int | None, found: list[Finding]) -> PreTrainedTokenizerBase | None:
    """Write a text as tokens and back, and a message by the chat template.

    Args:
        folder: of the model.
        vocab_size: tokens that the model knows, where that is known.
        found: findings are added to it.

    Returns:
        The tokenizer; None where there is none.
    """
    try:
        tokenizer = load_tokenizer(folder)
        ids = encode_text(tokenizer, PROMPT)
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
    except MoeflowError as error:
        found.append(Finding("tokenizer", str(folder), BROKEN, str(error), _DOWNLOAD))
        return None
    shown = f"{type(tokenizer).__name__}, {len(tokenizer)} tokens"
    # Some tokenizers write other spaces or cases: only a text of which nothing is left tells of damage.
    if not ids or not text.strip():
        found.append(
            Finding("tokenizer", f"{shown}; {PROMPT!r} became {brief(ids)}", BROKEN, "no text is left", _DOWNLOAD)
        )
        return None
    if vocab_size is not None and max(ids) >= vocab_size:
        wrong = f"token {max(ids)} is beyond the model's {vocab_size}: the tokenizer is of another model"
        found.append(Finding("tokenizer", shown, BROKEN, wrong, _DOWNLOAD))
        return None
    found.append(Finding("tokenizer", shown))
    _check_template(tokenizer, found)
    return tokenizer


def _check_template(tokenizer: PreTrainedTokenizerBase, found: list[Finding]) -> None:
    name = "chat template"
    if not tokenizer.chat_template:
        wrong = "messages are joined as plain text, which a model that was trained to chat does not expect"
        found.append(Finding(name, "none", HARMFUL, wrong, "use moeflow generate, or add chat_template.jinja"))
        return
    try:
        ids = encode_messages(tokenizer, [{"role": "user", "content": PROMPT}])
    except MoeflowError as error:
        found.append(Finding(name, "it fails on one message", BROKEN, str(error), _DOWNLOAD))
        return
    found.append(Finding(name, f"one message became {len(ids)} tokens"))
