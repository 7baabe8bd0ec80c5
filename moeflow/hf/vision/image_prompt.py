"""Messages that show images as a prompt: token ids by the processor's chat template, and the images' inputs.

Knows processors. Knows nothing of models or of where images come from.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from moeflow.errors import ConfigError
from moeflow.hf.encoding import encode_too_long
from moeflow.hf.vision.image_inputs import ImageInputs, image_inputs
from moeflow.hf.vision.processors import chat_template
from moeflow.hf.wall import one_line, wall

_Messages = list[dict[str, Any]]


class ImagePrompt(NamedTuple):
    """A prompt.

    Args:
        token_ids: with the places of its images, as many tokens as the model sees of each.
        images: what stands there; None for none.
    """

    token_ids: list[int]
    images: ImageInputs | None


def encode_with_images(
    processor: Any, messages: _Messages, context: int | None = None, *, tools: _Messages | None = None
) -> ImagePrompt:
    """Return the prompt for the answer to messages.

    Args:
        processor: the model's.
        messages: with "role" and "content": text, or a list of {"type": "text", "text"} and {"type": "image", "image"}
            with an image of Pillow.
        context: the model's positions, if known, as in `encode_messages`.
        tools: in OpenAI's form, for a template that writes them.

    Raises:
        ConfigError: template or processor refuse the messages, or leave out an image or what one of them says.
    """
    for number, message in enumerate(messages, 1):
        text = "".join(part["text"] for part in _parts(message) if part["type"] == "text")
        ids = encode_too_long(processor.tokenizer, text, f"message {number}", context)
        if ids is not None:
            return ImagePrompt(ids, None)
    # Templates differ in where the words are, as in `encode_messages`; images are parts in all.
    forms = [messages, [{**message, "content": _parts(message)} for message in messages]]
    for number, form in enumerate(forms, 1):
        try:
            _check_written(processor, form, tools)
            break
        except ConfigError:
            if number == len(forms):
                raise
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "tools": tools}
    made = _apply(processor, form, **options)
    with wall(_refusal):
        return ImagePrompt(made["input_ids"][0].tolist(), image_inputs(made))


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _check_written(processor: Any, messages: _Messages, tools: _Messages | None) -> None:
    """Refuse messages of which the template does not write every text, by a word of its own, and every image."""
    words: list[tuple[int, str]] = []

    def probe(number: int, text: str) -> str:
        if not text.strip():
            return text
        words.append((number, f"zqx{len(words)}xqz"))
        return words[-1][1]

    probes: _Messages = []
    for number, message in enumerate(messages, 1):
        content: Any = message["content"]
        if isinstance(content, str):
            content = probe(number, content)
        else:
            content = [
                {**part, "text": probe(number, part["text"])} if part["type"] == "text" else {"type": "image"}
                for part in content
            ]
        probes.append({**message, "content": content})
    written = str(_apply(processor, probes, tools=tools))
    missing = next((number for number, word in words if word not in written or _as_list(word, written)), None)
    for number, message in enumerate(probes, 1):
        if isinstance(message["content"], list) and any(part["type"] == "image" for part in message["content"]):
            for place, part in enumerate(message["content"]):
                if part["type"] == "image" and missing is None:
                    left = [*message["content"][:place], *message["content"][place + 1 :]]
                    without = [*probes[: number - 1], {**message, "content": left}, *probes[number:]]
                    missing = number if str(_apply(processor, without, tools=tools)) == written else None
    if missing is not None:
        raise ConfigError(
            f"the model's chat template leaves out a text or an image of message {missing}: the model would not read "
            "it. Leave it out, or say it in another message."
        )


def _as_list(word: str, written: str) -> bool:
    """Whether a text was written as a part in Python's form of a list."""
    return any(f"text{quote}: {quote}{word}" in written for quote in "'\"")


def _apply(processor: Any, messages: _Messages, **options: Any) -> Any:
    copies = [dict(message) for message in messages]  # transformers puts lists of its own into them
    with wall(_refusal):
        return processor.apply_chat_template(
            copies, chat_template=chat_template(processor), add_generation_prompt=True, **options
        )


def _refusal(error: BaseException) -> ConfigError:
    return ConfigError(f"the model's processor refuses this conversation with its images: {one_line(error)}")
