"""Small random models of the families that have an architecture of GGUF, of sizes that llama.cpp takes.

Their files are written by moeflow, and read back by the gguf library and moeflow's own rules.
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers

from helpers.families import Family
from helpers.family_models import build_model
from moeflow.hf.experts_interface import experts_modules
from moeflow.hf.gguf.architecture import Architecture, Rule
from moeflow.hf.gguf.writing import tensor_names

ROWS = 320  # of the embedding; the tokenizer has fewer tokens
SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "sliding_window": None,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 160,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
}
LINEAR = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 20000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 20000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 20000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(16)],
    "long_factor": [1.5 + 0.25 * i for i in range(16)],
    "original_max_position_embeddings": 256,
}
GRANITE = {
    "attention_multiplier": 0.25,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}


def _family(name: str, architecture: str, **overrides: Any) -> Family:
    known = {field.name for field in fields(getattr(transformers, architecture).config_class)}
    return Family(name, architecture, {key: value for key, value in SIZES.items() if key in known} | overrides)


def gguf_families() -> dict[str, Family]:
    """Every family, and of some more than one form."""
    mixtral, granite = "MixtralForCausalLM", "GraniteMoeForCausalLM"
    phi = {"attention_bias": True, "lm_head_bias": True}
    phi_rope = LONG | {"short_mscale": 1.25, "long_mscale": 1.25}
    return {
        family.name: family
        for family in (
            _family("mixtral", mixtral),
            _family("mixtral-wide-heads", mixtral, head_dim=64),
            _family("mixtral-tied", mixtral, tie_word_embeddings=True),
            _family("mixtral-linear", mixtral, rope_parameters=LINEAR),
            _family("mixtral-yarn", mixtral, rope_parameters=YARN),
            _family("mixtral-yarn-louder", mixtral, rope_parameters=YARN | {"attention_factor": 1.5}),
            _family("mixtral-llama3", mixtral, rope_parameters=LLAMA3),
            _family("mixtral-longrope", mixtral, rope_parameters=LONG),
            _family("granitemoe", granite, **GRANITE),
            _family("granitemoe-shared", "GraniteMoeSharedForCausalLM", shared_intermediate_size=160, **GRANITE),
            _family("qwen2moe", "Qwen2MoeForCausalLM"),
            _family("qwen3moe", "Qwen3MoeForCausalLM", norm_topk_prob=True, head_dim=64),
            _family("qwen3moe-yarn", "Qwen3MoeForCausalLM", norm_topk_prob=True, rope_parameters=YARN),
            _family("gpt-oss", "GptOssForCausalLM", sliding_window=8),
            _family("gpt-oss-yarn", "GptOssForCausalLM", sliding_window=8, rope_parameters=YARN | {"truncate": False}),
            _family("olmoe", "OlmoeForCausalLM", num_key_value_heads=4),
            _family("phimoe", "PhimoeForCausalLM", **phi),
            _family("phimoe-longrope", "PhimoeForCausalLM", rope_parameters=phi_rope, **phi),
            _family(
                "minimax-m2",
                "MiniMaxM2ForCausalLM",
                rope_parameters={"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5},
            ),
            _family(
                "ernie4_5-moe",
                "Ernie4_5_MoeForCausalLM",
                moe_layer_start_index=1,
                moe_num_shared_experts=2,
                moe_intermediate_size=64,
            ),
            _family("hunyuan-moe", "HunYuanMoEV1ForCausalLM"),
            _family(
                "hunyuan-moe-alpha",
                "HunYuanMoEV1ForCausalLM",
                rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 100.0, "factor": 1.0},
            ),
        )
    }


def save_family(family: Family, folder: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """Save a model of the family with a byte-level tokenizer, and return it."""
    model = build_model(family, dtype=dtype)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of a token for each byte, and one merge."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("h", "e")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


class ReadBack:
    """A file read by the gguf library.

    Args:
        file: GGUF.
    """

    def __init__(self, file: Path) -> None:
        reader = gguf.GGUFReader(file)
        self.metadata = {name: field.contents() for name, field in reader.fields.items()}
        self.kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {tensor.name: _values(tensor) for tensor in reader.tensors}
        self.used: set[str] = set()

    def config(self, architecture: Architecture) -> transformers.PreTrainedConfig:
        """The config that the architecture makes of the metadata."""
        read = {name: partial(self.tensors.__getitem__, name) for name in self.tensors}
        found = architecture.config(self.metadata, read)
        return transformers.CONFIG_MAPPING[found["model_type"]](**found)

    def parameter(self, name: str, rules: list[Rule], model: transformers.PreTrainedModel) -> torch.Tensor:
        """A parameter or saved buffer of a model, by the rules."""
        experts = {f"{path}.{tail}": module for path, module in experts_modules(model) for tail in module._parameters}
        for rule in rules:
            names = tensor_names(rule, name)
            layer = [part for part in name.split(".") if part.isdigit()]
            if rule.parameter.replace("{layer}", *layer[:1] or [""]) != name or "{expert}" in "".join(names):
                continue
            if not all(found in self.tensors for found in names):
                continue
            self.used |= set(names)
            found = [self.tensors[one] for one in names]
            if name not in experts:
                return rule.change.read(found, model.config)
            value = torch.stack(found, 2).flatten(1, 2) if rule.interleaves and len(found) > 1 else torch.cat(found, 1)
            turned = experts[name].is_transposed and value.dim() == 3
            return value.transpose(1, 2) if turned else value
        raise AssertionError(f"no rule makes {name} of the file's tensors")


def _values(tensor: Any) -> torch.Tensor:
    if tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return torch.from_numpy(tensor.data.copy())
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(values.reshape([int(size) for size in reversed(tensor.shape)]))


def load_back(file: Path, architecture: Architecture) -> tuple[transformers.PreTrainedModel, ReadBack]:
    """The model that a file describes, its config and every parameter from the file alone."""
    back = ReadBack(file)
    config = back.config(architecture)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    rules = architecture.rules(config)
    tied = set(empty.all_tied_weights_keys)
    state = {name: back.parameter(name, rules, empty) for name in empty.state_dict() if name not in tied}
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    missing, unexpected = model.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    assert set(missing) <= tied
    assert not unexpected
    return model.eval(), back
