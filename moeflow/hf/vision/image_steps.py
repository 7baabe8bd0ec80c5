"""Steps of `generate` over sequences that may show images, one sequence after the other.

Knows what some families keep of images in the model itself: how far positions are behind images.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from moeflow.hf.passes.generating.generate_step import generate_step
from moeflow.hf.vision.image_inputs import ImageInputs

_SHIFT = "rope_deltas"  # of positions behind images in three dimensions, of the last prompt that was computed


class ImageSteps:
    """Steps of one model, which puts back before each what its sequence's prompt has left in the model.

    Args:
        model: that generates token by token.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._keepers = [module for module in model.modules() if hasattr(module, _SHIFT)]

    def step(
        self, token_ids: list[int], cache: Any = None, shifts: Any = None, images: ImageInputs | None = None
    ) -> tuple[torch.Tensor, Any, Any]:
        """Run one step.

        Args:
            token_ids: of the whole sequence so far.
            cache: of an earlier step, covering the first of them and every image; changed. None computes all.
            shifts: what the step returned that gave the cache.
            images: what its prompt shows; None for none.

        Returns:
            Raw logits [V] of the last token in float32, the cache that covers all tokens, and the shifts to be given
            back with it.
        """
        if cache is not None:
            for keeper, shift in zip(self._keepers, shifts or [], strict=False):
                setattr(keeper, _SHIFT, shift)
        more = {}
        if images is not None and cache is None:
            more = images.of_pass(len(token_ids), self._model.device, self._model.dtype)
        logits, kept = generate_step(self._model, token_ids, cache, **more)
        return logits, kept, [getattr(keeper, _SHIFT) for keeper in self._keepers]
