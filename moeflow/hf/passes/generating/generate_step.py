"""Single steps of `generate`: raw logits, and the family's own cache, with which the next step goes on.

For families whose state of earlier positions only their own code knows.
"""

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch

from moeflow.errors import UnsupportedModelError
from moeflow.hf.passes import forward
from moeflow.hf.version import parts_of_transformers

with parts_of_transformers():
    from transformers import GenerationMixin, PreTrainedModel

# Whatever the checkpoint's generation settings say; temperature, top_p and top_k, or transformers warns of theirs.
_ONE_STEP: dict[str, Any] = {
    "max_new_tokens": 1, "do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50,
    "use_cache": True, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": 0,
    "stop_strings": None, "guidance_scale": None, "cache_implementation": None, "prompt_lookup_num_tokens": None,
    "penalty_alpha": None, "max_time": None,
}  # fmt: skip
# What they hold after a prompt and its answer is what a pass over both would leave, but for the last bits.
_PLAIN_LAYERS = {"DynamicLayer", "DynamicIndexedLayer", "DummyLayer", "GrowingLayer"}
_LASTING_LAYERS = _PLAIN_LAYERS | {
    "DynamicSlidingWindowLayer", "LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer", "GrowingHybridLayer", "DeepseekV4HCACache", "DeepseekV4CSACache",
}  # fmt: skip


def generate_step(
    model: PreTrainedModel, token_ids: list[int], cache: Any = None, **inputs: torch.Tensor
) -> tuple[torch.Tensor, Any]:
    """Run one step of `generate`.

    Args:
        model: that generates token by token.
        token_ids: of the whole sequence so far.
        cache: of an earlier step, covering the first of them; changed. None computes all.
        **inputs: what the model takes beside tokens.

    Returns:
        Raw logits [V] of the last token in float32, and the cache that covers all of them.

    Raises:
        UnsupportedModelError: its `generate` chooses several tokens at once, or keeps nothing.
    """
    ids = torch.tensor([token_ids], device=model.device)
    given: dict[str, Any] = {} if cache is None else forward.cache_argument(model, cache)
    generator = cast("GenerationMixin", model)
    made = cast("Any", generator.generate(ids, attention_mask=torch.ones_like(ids), **given, **inputs, **_ONE_STEP))
    logits, kept = made.get("logits"), made.get("cache", made.get("past_key_values"))
    if not logits or len(logits) != 1 or kept is None:
        raise UnsupportedModelError(f"{type(model).__name__} does not generate token by token. Call model.generate.")
    return logits[0][0], kept


def prompt_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Return the logits [N, V] of all tokens of a sequence, by one pass of their own."""
    ids = torch.tensor([token_ids], device=model.device)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]


def is_lasting(model: PreTrainedModel, cache: Any) -> bool:
    """Whether a prompt that begins with what a cache covers can go on with it, whoever chose these tokens.

    Not where prompts and answers are kept in different ways, or positions are scaled by the length.
    """
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    if any(each.get("rope_type") in ("dynamic", "longrope") for each in ropes):
        return False
    return all(type(layer).__name__ in _LASTING_LAYERS for layer in getattr(cache, "layers", [None]))


def can_forget(cache: Any) -> bool:
    """Whether a cache can forget its last positions: it keeps something of each alone."""
    layers = getattr(cache, "layers", None) or [None]
    plain = all(type(layer).__name__ in _PLAIN_LAYERS for layer in layers)
    return plain and bool(getattr(cache, "is_croppable", False))


def forget(cache: Any, num_positions: int) -> None:
    """Let a cache that can forget lose its last positions."""
    cache.crop(-num_positions)


def copy_cache(cache: Any) -> Any:
    """Return a cache that goes on by itself."""
    return copy.deepcopy(cache)


def cache_bytes(cache: Any) -> int:
    """Count the bytes of a cache's tensors, each piece of memory once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(cache)}
    return sum(storages.values())


def _tensors(root: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that an object holds, in its attributes, lists and dicts."""
    seen: set[int] = set()
    left = [root]
    while left:
        found = left.pop()
        if isinstance(found, torch.Tensor):
            yield found
        elif isinstance(found, dict):
            left += found.values()
        elif isinstance(found, (list, tuple)):
            left += found
        elif type(found).__module__.split(".")[0] in ("transformers", "moeflow") and id(found) not in seen:
            seen.add(id(found))
            left += getattr(found, "__dict__", {}).values()
