"""Fingerprints of a model: 16 hexadecimal digits that tie a trace, a predictor or kept keys and values to it."""

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel

from moeflow.hf import experts_interface

_SAMPLED_VALUES = 1024  # of each tensor
_ORIGIN = ("architectures", "transformers_version", "dtype", "torch_dtype")  # of a config; tensors tell their dtypes


@torch.no_grad()
def model_fingerprint(model: PreTrainedModel) -> str:
    """Hash the parts of a model that decide its routes: its shape and its routers' weights, rounded to bfloat16.

    A checkpoint in bfloat16 has the same fingerprint loaded as float32 or as bfloat16, with its experts or without.

    Args:
        model: a transformers model with routed experts, its weights loaded.

    Returns:
        The first 16 hexadecimal digits of a SHA-256.

    Raises:
        UnsupportedModelError: the model has no routed experts.
    """
    config = model.config.get_text_config(decoder=True)
    found = experts_interface.experts_modules(model)
    counts = [_num_experts(module) for _, module in found]
    shape = [
        model.config.model_type,
        len(found),
        counts,
        experts_interface.num_experts_per_tok(model),
        getattr(config, "hidden_size", None),
        getattr(config, "vocab_size", None),
    ]
    digest = hashlib.sha256(json.dumps(shape).encode())
    for (path, _), num_experts in zip(found, counts, strict=True):
        block, _, experts = path.rpartition(".")
        for name, parameter in sorted(model.get_submodule(block).named_parameters()):
            is_router = parameter.dim() == 2 and tuple(parameter.shape) == (num_experts, shape[4])
            if is_router and not name.startswith(f"{experts}."):
                digest.update(parameter.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def weights_fingerprint(model: PreTrainedModel) -> str:
    """Hash what decides the values that a model computes: its config, and a sample of each tensor in its memory.

    Unlike `model_fingerprint` it differs between dtypes and between models that are trained further. Experts that
    `load_moe` took off are not in it.

    Args:
        model: any transformers model.

    Returns:
        The first 16 hexadecimal digits of a SHA-256.
    """
    digest = hashlib.sha256(json.dumps(_told(model.config.to_dict()), sort_keys=True, default=str).encode())
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        step = tensor.numel() // _SAMPLED_VALUES | 1  # an odd one meets each byte of blocks, whose sizes are even
        sampled = tensor.flatten()[::step].contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(sampled.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _told(config: Any) -> Any:
    """Return a config without what names where it comes from."""
    if not isinstance(config, dict):
        return config
    return {key: _told(value) for key, value in config.items() if str(key)[0] != "_" and key not in _ORIGIN}


def _num_experts(module: torch.nn.Module) -> int:
    """Return how many experts a module holds; where they were taken off, stubs of their shape are left."""
    held = (*module.parameters(recurse=False), *vars(module).values())
    return next(tensor.shape[0] for tensor in held if isinstance(tensor, torch.Tensor))
