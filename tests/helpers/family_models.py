"""Small random models of every family, and what they are called with."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import torch
import transformers

from helpers.families import BATCH_SIZE, COMMON, SEQUENCE_LENGTH, VOCAB_SIZE, Family


def _shrink(config_class: type[transformers.PreTrainedConfig], overrides: dict[str, Any]) -> dict[str, Any]:
    known = {f.name for f in fields(config_class)}
    kwargs = {key: value for key, value in COMMON.items() if key in known}
    if "kv_lora_rank" in known:  # latent attention has one key head per query head
        kwargs["num_key_value_heads"] = kwargs["num_attention_heads"]
    for key, sub_class in config_class.sub_configs.items():
        if sub_class is transformers.AutoConfig:
            model_type = config_class.sub_configs_defaults[key].model_type
            sub_class = transformers.CONFIG_MAPPING[model_type]
        kwargs[key] = _shrink(sub_class, overrides.get(key, {})) | {"model_type": sub_class.model_type}
    return kwargs | {key: value for key, value in overrides.items() if key not in config_class.sub_configs}


def build_config(family: Family) -> transformers.PreTrainedConfig:
    """The shrunken config of `family`."""
    config_class = family.model_class.config_class
    return config_class(**_shrink(config_class, family.overrides))


@torch.no_grad()
def build_model(family: Family, seed: int = 0, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """An eval-mode model whose weights depend on `seed` alone and are large enough for every one to matter."""
    model = family.model_class._from_config(build_config(family), dtype=dtype, experts_implementation="eager")
    # Like `from_pretrained`, keep in float32 what the family asks for.
    in_float32 = [re.compile(re.escape(key).replace(r"\*", ".*")) for key in model._get_dtype_plan(dtype)]
    persistent = model.state_dict(keep_vars=True)
    biases = {name: tensor for name, tensor in model.named_buffers() if name in persistent and "bias" in name}
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in {**dict(model.named_parameters()), **biases}.items():
        if any(pattern.search(name) for pattern in in_float32):
            tensor.data = tensor.data.float()
        values = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            values *= 0.2
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values *= 0.1
        if name.endswith("balancing_biases"):  # Zaya sets the skip expert's bias to -1 on load, here the highest
            values = values / 10 - 1.05
            values[-1] = -1
        tensor.copy_(values)
    for name, tensor in model.named_buffers():
        if name.endswith("tid2eid"):  # DeepSeek V4 routes its first layers by a table of token ids
            scores = torch.rand(len(tensor), model.config.n_routed_experts, generator=generator)
            tensor.copy_(scores.topk(tensor.shape[1]).indices)
    return model.eval()


def inputs(family: Family) -> dict[str, torch.Tensor]:
    """Text-only forward arguments for `family`."""
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH_SIZE, SEQUENCE_LENGTH)
    kwargs = {"input_ids": torch.randint(3, VOCAB_SIZE, shape, generator=generator)}
    if family.name == "diffusion_gemma":  # random when left out
        kwargs["decoder_input_ids"] = torch.randint(3, VOCAB_SIZE, shape, generator=generator)
    return kwargs
