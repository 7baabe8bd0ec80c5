"""Which engine runs a model: the one of packed passes where it can, else the serial one; both where images come."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeflow.engine.engine import Engine
from moeflow.engine.kv_cache.budget import kv_budget
from moeflow.engine.serial.engine_with_images import EngineWithImages
from moeflow.engine.serial.serial_engine import SerialEngine
from moeflow.errors import ConfigError, UnsupportedModelError
from moeflow.memory_size import MemorySize

_OF_MANY = {"max_step_tokens", "regrouping", "kept_disk"}  # mean nothing where one sequence runs, a prompt in one pass
_NOT_OF_ONE = ("kept_folder", "group_size")
_IMAGES_SHARE = 8  # of kv_memory is for what is kept of conversations with images: one part of so many


def engine_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_batch_size: int = 32,
    max_waiting: int | None = None,
    **limits: Any,
) -> Engine:
    """Return an engine that runs a model.

    Args:
        model: any that generates token by token.
        tokenizer: the model's.
        max_batch_size: the largest number of sequences that run at once, where several can.
        max_waiting: most requests beyond these.
        **limits: other arguments of `Engine`; max_step_tokens and regrouping mean nothing where one sequence runs at a
            time.

    Raises:
        ConfigError: a limit is not allowed, or not possible where one sequence runs at a time.
        UnsupportedModelError: the model does not generate token by token.
    """
    try:
        return Engine(model, tokenizer, max_batch_size=max_batch_size, max_waiting=max_waiting, **limits)
    except UnsupportedModelError:
        for name in _NOT_OF_ONE:
            if limits.pop(name, None) is not None:
                raise ConfigError(
                    f"{name} is not possible: {type(model).__name__} runs one sequence at a time in its own cache. "
                    "Leave it out."
                ) from None
        known = {name: limits[name] for name in limits.keys() - _OF_MANY}
        waiting = None if max_waiting is None else max_waiting + max_batch_size - 1
        return SerialEngine(model, tokenizer, max_waiting=waiting, **known)


def engine_with_images_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    kv_memory: MemorySize = "auto",
    **limits: Any,
) -> EngineWithImages:
    """Return an engine that runs a model which takes images: prompts that show some one after the other.

    An eighth of kv_memory is for what is kept of these; of "auto" it comes on top.

    Args:
        model: whose processor makes `ImageInputs`.
        tokenizer: the model's.
        kv_memory: as of `engine_for`.
        **limits: as of `engine_for`.

    Raises:
        ConfigError: a limit is not allowed.
        UnsupportedModelError: the model does not generate token by token.
    """
    whole = kv_budget(kv_memory, model)
    of_images = whole // _IMAGES_SHARE
    of_texts = kv_memory if kv_memory == "auto" else whole - of_images
    texts = engine_for(model, tokenizer, kv_memory=of_texts, **limits)
    if isinstance(texts, SerialEngine):
        return EngineWithImages(texts, texts)
    return EngineWithImages(
        texts, SerialEngine(model, tokenizer, kv_memory=of_images, kv_format="auto", kv_policy=None)
    )
