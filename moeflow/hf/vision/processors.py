"""Processors of vision models: loaded without what only videos need, and whether a model takes what they make.

Knows transformers' processors. Knows nothing of prompts.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeflow.hf.version import parts_of_transformers
from moeflow.hf.wall import one_line

with parts_of_transformers():
    import transformers
    from transformers import AutoProcessor, ProcessorMixin
    from transformers.utils import cached_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_VIDEO = "video_processor"


def load_processor(model: str | Path) -> tuple[Any, str]:
    """Return a model's processor of images, and why there is none.

    transformers reads videos with torchvision alone, and refuses the whole processor without it; here the part for
    images is loaded.

    Args:
        model: a hub id or a folder.

    Returns:
        (processor, ""), or (None, the reason).
    """
    names = _class_names(model)
    if names is None:
        return None, "its checkpoint has no processor of images"
    try:
        return _with_images(AutoProcessor.from_pretrained(model, trust_remote_code=False))
    except Exception as error:  # of files, of versions, of libraries that are missing
        reason = one_line(error)
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, ProcessorMixin) and _VIDEO in found.get_attributes():
            try:
                return _with_images(without_videos(found).from_pretrained(model, trust_remote_code=False))
            except Exception as error:
                reason = one_line(error)
    return None, f"transformers {transformers.__version__} cannot load its processor ({reason})"


def without_videos(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Return a processor's class that has no part for videos, and so needs no torchvision."""
    attributes = [name for name in processor_class.get_attributes() if name != _VIDEO]
    more = {"get_attributes": classmethod(lambda cls: attributes), "__module__": processor_class.__module__}
    return type(processor_class.__name__, (processor_class,), more)


def why_no_images(model: PreTrainedModel, processor: Any) -> str:
    """Return why a model takes no images by way of a processor; nothing where it does."""
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        return f"it is loaded as {type(model).__name__}, which takes text alone"
    return "" if chat_template(processor) else "its processor has no chat template"


def chat_template(processor: Any) -> Any:
    """Return the chat template of a processor or of its tokenizer; None where neither has one."""
    return getattr(processor, "chat_template", None) or processor.tokenizer.chat_template


def _with_images(processor: Any) -> tuple[Any, str]:
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        return None, "its checkpoint has no processor of images"
    return processor, ""


def _class_names(model: str | Path) -> list[str] | None:
    """Return what a checkpoint's files call its processor's class; None where no file tells of one."""
    found: dict[str, dict[str, Any]] = {}
    for name in _FILES:
        try:
            path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
            read = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(read, dict) and read:
            found[name] = read
    if not found.keys() & set(_FILES[:2]):
        return None
    named = [read.get("processor_class") for read in found.values()]
    return list(dict.fromkeys(name for name in named if isinstance(name, str)))
