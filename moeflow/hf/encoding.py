"""Prompts as token ids: a text as it is, and messages as the tokenizer's chat template writes them.

Knows tokenizers and chat templates. Knows nothing of models. Imports no torch, so that files of prompts can be checked
without it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from moeflow.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LETTERS_AT_LEAST = 200_000  # of a text whose beginning is tokenised alone
_Messages = list[dict[str, Any]]


def check_text(text: str, what: str) -> str:
    """Return a text that a tokenizer can read.

    Args:
        text: of a user.
        what: how an error calls it.

    Raises:
        ConfigError: it has half of a surrogate pair, as Python puts it for a byte that is no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{what} has {text[error.start]!r} at character {error.start + 1}, which is no text: half of a surrogate "
            "pair, or a byte that is not UTF-8. Give it as UTF-8."
        ) from None
    return text


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, context: int | None = None, *, special_tokens: bool = True
) -> list[int]:
    """Return the token ids of a text as it is.

    Args:
        tokenizer: the model's.
        text: of a user.
        context: the model's positions, if known. Of a text whose beginning alone has more than twice as many tokens,
            only these are returned: all of it would take up to two seconds and 200 MB a megabyte, to be refused.
        special_tokens: whether those that the tokenizer puts around a text are put around it.

    Raises:
        ConfigError: it is no text, or the tokenizer fails on it.
    """
    check_text(text, "the prompt")
    if context is not None and len(text) > _letters_alone(context):
        ids = encode_text(tokenizer, text[: _letters_alone(context)], special_tokens=special_tokens)
        if len(ids) > 2 * context:  # where a text is cut, a few tokens may differ
            return ids
    with _wall("the model's tokenizer cannot read this text"):
        return list(tokenizer(text, add_special_tokens=special_tokens)["input_ids"])


def encode_too_long(tokenizer: PreTrainedTokenizerBase, text: str, what: str, context: int | None) -> list[int] | None:
    """Return the first token ids of a text that is far longer than a context; None for one that is not.

    Args:
        tokenizer: the model's.
        text: of a user.
        what: how an error calls it.
        context: the model's positions; None where they are not known.

    Raises:
        ConfigError: it is no text, or the tokenizer fails on it.
    """
    check_text(text, what)
    if context is None or len(text) <= _letters_alone(context):
        return None
    ids = encode_text(tokenizer, text, context)
    return ids if len(ids) > 2 * context else None


def response_parser(template: dict[str, Any], begun: str, tools: list[dict[str, Any]]) -> Any:
    """Return transformers' parser of one answer, with `feed` and `finalize`.

    Args:
        template: a response template.
        begun: what the prompt has written of the answer.
        tools: in OpenAI's form; their schemas give arguments their types.
    """
    from transformers.utils.chat_parsing import ResponseParser

    return ResponseParser(template, prefix=begun, tools=list(tools))


def writes_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template tells the model of tools."""
    if not tokenizer.chat_template:
        return False
    name = "zqxtoolxqz"
    function = {"name": name, "description": "", "parameters": {"type": "object", "properties": {}}}
    try:
        messages = [{"role": "user", "content": "x"}]
        written = _apply(tokenizer, messages, tokenize=False, tools=[{"type": "function", "function": function}])
    except ConfigError:
        return False
    return name in str(written)


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    context: int | None = None,
    *,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Return the prompt for the answer to messages; without a chat template their texts, joined.

    Templates differ in where the words are: as text, or as the parts of a content; some know no system role. The first
    form in which the template writes the words of every message is taken, a system prompt where it stands or before the
    first message of a user.

    Args:
        tokenizer: the model's.
        messages: with "role" and "content", both text.
        context: the model's positions, if known, as in `encode_text`.
        tools: in OpenAI's form, for a template that writes them.

    Raises:
        ConfigError: the template refuses the messages, fails on them, or leaves out what one of them says; or one is
            no text.
    """
    for number, message in enumerate(messages, 1):
        ids = encode_too_long(tokenizer, message["content"], f"message {number}", context)
        if ids is not None:
            return ids
    if not tokenizer.chat_template:
        text = "".join(m["content"] + ("" if m["role"] == "user" else "\n") for m in messages)
        return encode_text(tokenizer, text, context)
    whole: list[_Messages] = [list(messages)]
    if len(messages) > 1 and messages[0]["role"] == "system" and messages[1]["role"] == "user":
        # Gemma's and the first Mistrals' templates know no system role, and Phi-3's writes nothing for it.
        joined = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        whole.append([{"role": "user", "content": joined}, *messages[2:]])
    refusal = None
    for attempt in whole:
        try:
            _check_words(tokenizer, attempt, tools)
            return _encode(tokenizer, attempt, tools)
        except ConfigError as error:
            refusal = error
    for attempt in whole:
        parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in attempt]
        try:
            _check_words(tokenizer, parts, tools)
            return _encode(tokenizer, parts, tools)
        except ConfigError:
            continue  # what is wrong with the texts says more than what is wrong with their parts
    assert refusal is not None, "a form was tried"
    raise refusal


def _check_words(tokenizer: PreTrainedTokenizerBase, messages: _Messages, tools: _Messages | None) -> None:
    """Refuse messages of which the template does not write all.

    A word of its own stands for the text of each message: real texts may be in a template's own words or in each other,
    and templates may shorten them on purpose (the reasoning of earlier answers, white space).
    """
    probes: _Messages = []
    words = [f"zqx{number}xqz" for number in range(len(messages))]
    for word, message in zip(words, messages, strict=True):
        content = message["content"]
        text = content if isinstance(content, str) else content[0]["text"]
        word = word if text.strip() else text
        probes.append({**message, "content": word if content is text else [{"type": "text", "text": word}]})
    written = str(_apply(tokenizer, probes, tokenize=False, tools=tools))
    for number, (word, probe) in enumerate(zip(words, probes, strict=True), 1):
        content = probe["content"]
        if isinstance(content, list):
            as_parts = any(f"text{quote}: {quote}{word}" in written for quote in "'\"")  # Python's list, written out
            missing = content[0]["text"] == word and (as_parts or word not in written)
        else:
            missing = content == word and word not in written
        if missing:
            raise ConfigError(
                f"the model's chat template leaves out message {number}, of the {probe['role']}: the model would not "
                "read it. Leave it out, or say it in another message."
            )


def _encode(tokenizer: PreTrainedTokenizerBase, messages: _Messages, tools: _Messages | None) -> list[int]:
    return list(_apply(tokenizer, messages, tokenize=True, return_dict=True, tools=tools)["input_ids"])


def _apply(tokenizer: PreTrainedTokenizerBase, messages: _Messages, **options: Any) -> Any:
    """Call the chat template. It is a program of the checkpoint's, which may fail in any way."""
    with _wall("the model's chat template refuses this conversation"):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)


def _wall(told: str) -> AbstractContextManager[None]:
    """Return a wall that tells what happened and why."""
    from jinja2 import TemplateError

    from moeflow.hf.wall import one_line, wall

    def tell(error: BaseException) -> ConfigError:
        reason = " ".join(str(error).split())[:300] if isinstance(error, TemplateError) else ""
        return ConfigError(f"{told}: {reason or one_line(error)}")

    return wall(tell)


def _letters_alone(context: int) -> int:
    """Return of how many letters a beginning is, by which a text is known to be far longer than a context."""
    return max(_LETTERS_AT_LEAST, 8 * context)
