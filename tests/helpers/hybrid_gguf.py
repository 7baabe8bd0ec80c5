"""Tiny models of the hybrid architectures of GGUF, and files of them: written and read back through their rules."""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from moeflow.convert.gguf import add_keys
from moeflow.hf.gguf.architecture import Architecture, Rule, Same

VOCABULARY = 288
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
_ROUTER = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
_LATENT = {**_ROUTER, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64}
_LATENT |= {"num_key_value_heads": 4, "n_shared_experts": 2}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_DELTA = {
    "num_hidden_layers": 4,
    "head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}
_WINDOW = ["sliding_attention"] * 3 + ["full_attention"]

# name -> (architecture in the file, class of transformers without its end, what its config has)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deepseek-v2": (
        "deepseek2",
        "DeepseekV2",
        {**_LATENT, "q_lora_rank": 32, "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "deepseek-v2-lite": (
        "deepseek2",
        "DeepseekV2",
        # llama.cpp knows the models without q_lora_rank by their 27 layers
        {**_LATENT, "q_lora_rank": None, "num_hidden_layers": 27, "routed_scaling_factor": 1.0},
    ),
    "deepseek-v3": (
        "deepseek2",
        "DeepseekV3",
        {
            **_LATENT,
            "q_lora_rank": 32,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "kimi-k2": ("deepseek2", "DeepseekV3", {**_LATENT, "q_lora_rank": 32, "n_group": 1, "topk_group": 1}),
    "glm4moe": (
        "glm4moe",
        "Glm4Moe",
        {**_ROUTER, "head_dim": 32, "use_qk_norm": True, "attention_bias": True, "n_shared_experts": 1},
    ),
    "dots1": (
        "dots1",
        "Dots1",
        {**_ROUTER, "head_dim": 32, "num_key_value_heads": 4, "n_shared_experts": 2, "sliding_window": None},
    ),
    "exaone-moe": (
        "exaone-moe",
        "ExaoneMoe",
        {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "sliding_window": 8,
            "layer_types": _WINDOW,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
        },
    ),
    "afmoe": (
        "afmoe",
        "Afmoe",
        {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "sliding_window": 8,
            "layer_types": _WINDOW,
            "mup_enabled": True,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "num_shared_experts": 2,
            "route_scale": 2.5,
        },
    ),
    "qwen3next": ("qwen3next", "Qwen3Next", {**_DELTA}),
    "qwen35moe": (
        "qwen35moe",
        "Qwen3_5Moe",
        {
            **_DELTA,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
    ),
    "lfm2moe": (
        "lfm2moe",
        "Lfm2Moe",
        {
            "num_hidden_layers": 4,
            "hidden_size": 128,
            "layer_types": ["conv", "full_attention"] * 2,
            "num_dense_layers": 1,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
        },
    ),
    "nemotron_h_moe": (
        "nemotron_h_moe",
        "NemotronH",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "head_dim": 32,
            "ssm_state_size": 32,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 8,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 64,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
        },
    ),
}


def _another_form(name: str, **changed: Any) -> tuple[str, str, dict[str, Any]]:
    architecture, family, fields = MODELS[name]
    return architecture, family, {**fields, **changed}


MODELS["glm4moe-plain"] = _another_form(
    "glm4moe",
    use_qk_norm=False,
    attention_bias=False,
    norm_topk_prob=False,
    n_group=4,
    topk_group=2,
    tie_word_embeddings=True,
    rope_parameters={**_YARN, "partial_rotary_factor": 0.5},
)
MODELS["qwen3next-listed"] = _another_form(
    "qwen3next", layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention"]
)
MODELS["nemotron_h_moe-latent"] = _another_form("nemotron_h_moe", moe_latent_size=32, n_group=4, topk_group=2)


def tiny_config(name: str, **changed: Any) -> transformers.PreTrainedConfig:
    """Return the config of a model of `MODELS`."""
    _, family, fields = MODELS[name]
    kind = "TextConfig" if family == "Qwen3_5Moe" else "Config"
    return getattr(transformers, f"{family}{kind}")(**{**_COMMON, **fields, **changed})


def tiny_model(name: str, **changed: Any) -> transformers.PreTrainedModel:
    """Return a model of `MODELS` with random parameters, float32 and of few digits: one more or less is exact."""
    return fill(getattr(transformers, f"{MODELS[name][1]}ForCausalLM")(tiny_config(name, **changed)))


def fill(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Give every parameter values that show in the logits."""
    random = torch.Generator().manual_seed(7)
    for parameter_name, parameter in model.state_dict().items():
        values = torch.randn(parameter.shape, generator=random)
        if parameter_name.endswith("A_log"):
            values = values.abs()
        elif "norm" in parameter_name:
            values = parameter + values / 4
        elif parameter.dim() > 1 and "conv" not in parameter_name:
            values = values * parameter.shape[-1] ** -0.5
        parameter.copy_((values * 2**14).round() / 2**14)
    return model.eval()


def write_file(model: transformers.PreTrainedModel, architecture: Architecture, path: Path) -> None:
    """Write a GGUF file in float32 with a vocabulary of bytes."""
    assert architecture.metadata
    writer = gguf.GGUFWriter(path, architecture.name)
    add_keys(writer, architecture.metadata(model.config))
    _add_vocabulary(writer, model.config)
    for name, tensor in write_tensors(model, architecture).items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, config: Any) -> None:
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the others get letters from 256 on
    hidden = [byte for byte in range(256) if byte not in shown]
    words = [chr(byte if byte in shown else 256 + hidden.index(byte)) for byte in range(256)] + ["ab"]
    words += [f"[PAD{number}]" for number in range(len(words), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges(["a b"])
    writer.add_add_bos_token(False)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the metadata and the tensors of a file in float32."""
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    return metadata, {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}


def write_tensors(model: transformers.PreTrainedModel, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Return the file's tensors of a model's parameters."""
    written: dict[str, torch.Tensor] = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        rule, layer = _rules_of(name, architecture, model.config)[0]
        stacked = isinstance(rule.change, Same) and len(rule.tensors) == 2
        parts = parameter.chunk(2, dim=1) if stacked else rule.change.write(parameter, model.config)
        written |= {tensor.format(layer=layer): part for tensor, part in zip(rule.tensors, parts, strict=True)}
    return written


def read_parameters(
    model: transformers.PreTrainedModel, architecture: Architecture, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the parameters of a model, made of a file's tensors."""
    read = {}
    for name in model.state_dict():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        for rule, layer in _rules_of(name, architecture, model.config):
            names = [tensor.format(layer=layer, expert=0) for tensor in rule.tensors]
            if all(tensor in tensors for tensor in names):
                found = [tensors[tensor] for tensor in names]
                stacked = isinstance(rule.change, Same) and len(found) == 2
                read[name] = torch.cat(found, dim=1) if stacked else rule.change.read(found, model.config)
                break
        else:
            raise KeyError(f"no tensor of the file makes {name}")
    return read


def _rules_of(name: str, architecture: Architecture, config: Any) -> list[tuple[Rule, str]]:
    """Return the rules of a parameter and its layer's number."""
    numbered = re.search(r"(?<=layers\.)\d+", name)
    template = re.sub(r"(?<=layers\.)\d+", "{layer}", name, count=1)
    found = [rule for rule in architecture.rules(config) if rule.parameter == template]
    assert found, f"no rule for {name}"
    return [(rule, numbered[0] if numbered else "") for rule in found]
