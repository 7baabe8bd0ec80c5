"""Text and messages made token ids by a model's tokenizer and chat template; what they refuse is told as our errors.

Knows tokenizers of transformers. Knows nothing of conversations or files.
"""

from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from moeflow.errors import ConfigError
from moeflow.hf.wall import one_line, wall


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool = True) -> list[int]:
    """Return the token ids of a text.

    Args:
        tokenizer: of the model.
        text: any text that UTF-8 can hold.
        special_tokens: whether those that the tokenizer puts around a text are put around it.

    Raises:
        ConfigError: the tokenizer cannot read the text.
    """
    _check_text(text)
    with wall(_tell_of_text):
        return list(tokenizer(text, add_special_tokens=special_tokens)["input_ids"])


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[int]:
    """Return the token ids of a conversation, the answer's opening included.

    Args:
        tokenizer: of the model, with a chat template.
        messages: each with "role" and "content".

    Raises:
        ConfigError: the template refuses the messages or fails, or a message is no text.
    """
    for message in messages:
        if isinstance(message.get("content"), str):
            _check_text(message["content"])
    with wall(_tell_of_template):
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(encoded["input_ids"])


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the prompt holds {text[error.start]!r} at character {error.start + 1}, which is no text: it comes of "
            "bytes that are not UTF-8, or of half a character. Give it as UTF-8."
        ) from None


def _tell_of_text(error: BaseException) -> ConfigError:
    return ConfigError(
        f"the model's tokenizer cannot read the prompt ({one_line(error)}). Give another text, or download the "
        "tokenizer's files again."
    )


def _tell_of_template(error: BaseException) -> ConfigError:
    reason = str(error) if isinstance(error, jinja2.TemplateError) else one_line(error)
    return ConfigError(f"the model's chat template refuses this conversation: {' '.join(reason.split())[:300]}")
