"""GLM-4.5 and dots.llm1: full attention, and DeepSeek's third router. Knows names and keys."""

from collections.abc import Mapping
from typing import Any

from moeflow.errors import UnsupportedModelError
from moeflow.hf.gguf.architecture import Architecture, Rule, Tensors
from moeflow.hf.gguf.families import keys as k
from moeflow.hf.gguf.families.routers import needs_bias, router_config, router_metadata, router_rules, sigmoid_scores
from moeflow.hf.gguf.families.rules import attention, ends, renamed


def _glm4_config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = k.Keys(metadata, "glm4moe")
    sigmoid_scores(keys)
    needs_bias(tensors)
    if any(keys.get("rope.dimension_sections", [])):
        raise UnsupportedModelError("the file is of a model that sees (rope.dimension_sections); moeflow reads text.")
    config = k.decoder_config(keys, tensors) | router_config(keys)
    config["rope_parameters"].setdefault("partial_rotary_factor", 1.0)  # transformers' default is another
    return config | {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        "num_nextn_predict_layers": 0,
    }


def _glm4_metadata(config: Any) -> dict[str, Any]:
    return k.decoder_metadata(config, "glm4moe", router_metadata(config))


def _glm4_rules(config: Any) -> list[Rule]:
    return _rules("post_attention_norm")


def _dots1_config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = k.Keys(metadata, "dots1")
    sigmoid_scores(keys)
    needs_bias(tensors)
    return (
        k.decoder_config(keys, tensors)
        | router_config(keys)
        | {
            "model_type": "dots1",
            "architectures": ["Dots1ForCausalLM"],
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "sliding_window": None,
        }
    )


def _dots1_metadata(config: Any) -> dict[str, Any]:
    k.refuse(config, "tie_word_embeddings", False)
    if "sliding_attention" in config.layer_types:
        raise UnsupportedModelError("a GGUF file of dots1 cannot say which layers attend to a window.")
    if config.num_key_value_heads != config.num_attention_heads:
        raise UnsupportedModelError(
            f"a GGUF file of dots1 has as many heads of keys as of queries; the config has "
            f"{config.num_key_value_heads} and {config.num_attention_heads}."
        )
    return k.decoder_metadata(config, "dots1", router_metadata(config))


def _dots1_rules(config: Any) -> list[Rule]:
    return _rules("ffn_norm")


def _rules(second_norm: str) -> list[Rule]:
    return [
        *ends(),
        *renamed("input_layernorm", "attn_norm"),
        *attention(),
        *renamed("post_attention_layernorm", second_norm),
        *router_rules(),
    ]


GLM4MOE = Architecture("glm4moe", "glm4_moe", _glm4_config, _glm4_metadata, _glm4_rules)
DOTS1 = Architecture("dots1", "dots1", _dots1_config, _dots1_metadata, _dots1_rules)
