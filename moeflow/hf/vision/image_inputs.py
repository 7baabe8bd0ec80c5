"""What a prompt shows beside its tokens, as its model takes it.

Knows tensors by the names that a model's forward has for them. Knows nothing of images or prompts' texts.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

_OF_TOKENS = "token_type_ids"  # in the names of inputs that have a value for each token


class ImageInputs:
    """The inputs of one prompt's images.

    Args:
        tensors: by their names, as the model's processor has made them; those of tokens are [1, tokens of the prompt].

    Attributes:
        num_bytes: of all of them.
        key: hexadecimal digits that differ where any image differs, or their order.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        digest = hashlib.sha256()
        for name in sorted(tensors):
            if _OF_TOKENS not in name:
                tensor = tensors[name]
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        self.key = digest.hexdigest()

    def of_pass(self, num_tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return what a pass over a whole sequence takes beside its tokens; later ones have it in their cache.

        Args:
            num_tokens: of the sequence; those behind the prompt are text.
            device: the model's.
            dtype: the model's, for inputs that are no whole numbers.
        """
        taken = {}
        for name, tensor in self._tensors.items():
            if _OF_TOKENS in name:
                text = tensor.new_zeros((1, num_tokens - tensor.shape[1]))
                tensor = torch.cat([tensor, text], 1)
            taken[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        return taken


def image_inputs(made: Any) -> ImageInputs:
    """Return the inputs of images of what a processor has made of one prompt, its tokens left out.

    Raises:
        ValueError: there are none, or one is no tensor.
    """
    tensors = {name: made[name] for name in made if name not in ("input_ids", "attention_mask")}
    if "pixel_values" not in tensors:
        raise ValueError("the processor has made nothing of the images")
    wrong = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise ValueError(f"the processor's {wrong[0]} is a {type(tensors[wrong[0]]).__name__}, which is no tensor")
    return ImageInputs(tensors)
