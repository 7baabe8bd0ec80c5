"""The model that is served: its name, its prompts as token ids, the room for an answer, its own sampling.

Knows the model's facts and its tokenizer. Knows nothing of HTTP but its errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from moeflow.chat.answer import checkpoint_params
from moeflow.engine.structure.grammars import grammars_of
from moeflow.errors import ConfigError
from moeflow.hf.encoding import encode_messages, encode_text, writes_tools
from moeflow.hf.vision.image_prompt import ImagePrompt, encode_with_images
from moeflow.server.reading.answer_reader import AnswerReader
from moeflow.server.reading.hermes import with_tools_as_text
from moeflow.server.reading.images import ImageParts, decode_images
from moeflow.server.reading.marks import HERMES, Marks, marks_of
from moeflow.server.reading.tools import Tools
from moeflow.server.wire.errors import RETRY_S, HttpError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moeflow.engine.sampling_params import SamplingParams
    from moeflow.hf.vision.image_inputs import ImageInputs
    from moeflow.server.settings import ServerSettings

_MARK_TOKENS = 16  # of a prompt's end, in which it may begin an answer
_MAX_MESSAGES = 2_048  # each is looked for in what the chat template writes


class ServedModel:
    """What endpoints ask of the model without running it.

    Args:
        model: of `load_moe`, or any transformers causal LM that an engine takes.
        tokenizer: the model's.
        settings: the server's; its name and context take the place of the model's.
        kv_positions: positions for whose keys and values there is memory; None where memory sets no limit.
        processor: the model's, of images; None where there is none.
        no_images: why the model takes none; "" where it does.

    Attributes:
        name: what requests may call the model; its last part, behind "/", is taken too.
        context: most positions of a prompt and its answer.
        vocab_size: token ids are below it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: ServerSettings,
        kv_positions: int | None,
        processor: Any,
        no_images: str,
    ) -> None:
        from moeflow.hf.passes.forward import context_positions, end_tokens, vocab_size

        self._model = model
        self._settings = settings
        self._processor = processor
        self._no_images = no_images
        self._shown: WeakSet[ImageInputs] = WeakSet()  # of the requests under way
        self.tokenizer = tokenizer
        found = str(getattr(model.config, "name_or_path", "") or "model")
        self.name = settings.model_name or served_name(found)
        limits = (context_positions(model), settings.context, kv_positions)
        self.context = min(limit for limit in limits if limit is not None)
        self._end_tokens = end_tokens(model, tokenizer)
        self._writes_tools = writes_tools(tokenizer)
        self.vocab_size = vocab_size(model)

    def check_name(self, name: object) -> None:
        """Refuse a request for another model; none at all is taken.

        Raises:
            HttpError: 404, it is another.
        """
        if name is None or name in (self.name, self.name.rpartition("/")[2]):
            return
        raise HttpError(
            404,
            f"the model {str(name)[:100]!r} is not served here: this is {self.name!r}.",
            param="model",
            code="model_not_found",
        )

    def image_parts(self) -> ImageParts:
        """Return what reads the image parts of one request."""
        return ImageParts(self._settings, self._no_images)

    def encode_messages(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, *, cut: bool = True
    ) -> ImagePrompt:
        """Return the prompt for the answer to messages.

        Args:
            messages: of `read_conversation`, with "role" and "content"; calls and results too.
            tools: in OpenAI's form; as text where the chat template knows none.
            cut: whether what is far longer than the context is cut, and still longer than it.

        Raises:
            ConfigError: the chat template refuses them, they are too many, or an image is broken or too large.
            HttpError: 429, the images of requests under way take too much memory.
        """
        if len(messages) > _MAX_MESSAGES:
            raise ConfigError(f"messages are {len(messages):,}; it must be {_MAX_MESSAGES:,} at most")
        has_calls = any("tool_calls" in message or message["role"] == "tool" for message in messages)
        if (tools or has_calls) and not self._writes_tools:
            messages, tools = with_tools_as_text(messages, tools or []), None
        context = self.context if cut else None
        if any(isinstance(message["content"], list) for message in messages):
            messages = decode_images(messages, self._settings.max_image_pixels)
            prompt = encode_with_images(self._processor, messages, context, tools=tools)
            if prompt.images is not None:
                self._hold(prompt.images)
            return prompt
        return ImagePrompt(encode_messages(self.tokenizer, messages, context, tools=tools), None)

    def _hold(self, images: ImageInputs) -> None:
        held = sum(one.num_bytes for one in self._shown)
        if held and held + images.num_bytes > self._settings.max_images_memory:
            raise HttpError(
                429,
                f"the images of requests under way take {held:,} bytes of {self._settings.max_images_memory:,}, and "
                f"these {images.num_bytes:,}. Try again later.",
                code="too_many_requests",
                headers={"retry-after": RETRY_S},
            )
        self._shown.add(images)

    def marks(self, *, calls: bool) -> Marks:
        """Return how answers are read, with or without tool calls."""
        return marks_of(self.tokenizer, calls=calls, family=HERMES if calls and not self._writes_tools else None)

    def reader(self, marks: Marks | None, prompt_ids: list[int], tools: Tools) -> AnswerReader:
        """Return what reads an answer to a prompt; None for marks where it is nothing but text."""
        end = self.decode(prompt_ids[-_MARK_TOKENS:])
        return AnswerReader(marks or Marks(None), end, tools.offered, most_calls=None if tools.parallel else 1)

    def encode_text(self, text: str, *, special_tokens: bool = True, cut: bool = True) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: a user's.
            special_tokens: whether those that the tokenizer puts around a text are put around it.
            cut: whether what is far longer than the context is cut, and still longer than it.

        Raises:
            ConfigError: it is no text.
        """
        context = self.context if cut else None
        return encode_text(self.tokenizer, text, context, special_tokens=special_tokens)

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of tokens, special ones written."""
        return str(self.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))

    def token_text(self, token_id: int) -> str:
        """Return what one token reads as alone."""
        return self.decode([token_id])

    def check_ids(self, ids: list[Any], param: str) -> None:
        """Refuse what are no token ids.

        Raises:
            HttpError: 400, one is none.
        """
        wrong = [token for token in ids if type(token) is not int or not 0 <= token < self.vocab_size]
        if wrong:
            raise HttpError(
                400,
                f"{param} has {wrong[0]!r:.100}, which is no token id: they are 0 to {self.vocab_size - 1}.",
                param=param,
            )

    def room(self, ids: list[int], param: str) -> int:
        """Return how many tokens an answer to a prompt may have.

        Raises:
            HttpError: 400, the prompt is empty, or leaves no room for an answer.
        """
        if not ids:
            raise HttpError(400, "the prompt has no tokens: give at least one.", param=param)
        if len(ids) > self.context:
            raise HttpError(
                400,
                f"the prompt has {len(ids):,} tokens, and the context {self.context:,} positions. Shorten the prompt, "
                "or start the server with more --context or --kv-memory if the model allows it.",
                param=param,
                code="context_length_exceeded",
            )
        return self.context - len(ids) + 1  # the last token's position is never computed

    def params(self, **given: Any) -> SamplingParams:
        """Return a request's sampling; what it leaves open is the model's own.

        Raises:
            ConfigError: a value is out of its range.
        """
        return checkpoint_params(self._model, **given)

    def compile(self, params: SamplingParams) -> None:
        """Compile what binds an answer, so that the engine finds it made.

        Raises:
            ConfigError: it cannot be compiled.
        """
        if params.structure is not None:
            grammars_of(self.tokenizer, self._end_tokens).start(*params.structure)

    def about(self) -> dict[str, Any]:
        """Return the model as /v1/models lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "moeflow",
            "max_model_len": self.context,
        }


def served_name(source: str) -> str:
    """Return what a model is called: a hub id as it is, a folder by its last part."""
    text = source.rstrip("/")
    is_hub_id = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    return text if is_hub_id else text.rpartition("/")[2] or "model"
