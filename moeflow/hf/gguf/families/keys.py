"""The keys of a GGUF file's metadata that most architectures share, and the fields of config.json they become.

Knows keys and fields. Knows nothing of tensors' values.
"""

from collections.abc import Mapping
from typing import Any

from moeflow.errors import UnsupportedModelError
from moeflow.hf.gguf.architecture import Tensors


class Keys:
    """The metadata of one architecture, by keys without its name in front.

    Args:
        metadata: the file's.
        name: of the architecture.
    """

    def __init__(self, metadata: Mapping[str, Any], name: str) -> None:
        self.metadata, self._name = metadata, name

    def __getitem__(self, key: str) -> Any:
        """Return a value; KeyError with the whole key."""
        return self.metadata[f"{self._name}.{key}"]

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self._name}.{key}", default)

    def one(self, key: str, default: Any = None) -> Any:
        """Return a value that may be listed for each layer, where all layers must have the same."""
        value = self.get(key, default) if default is not None else self[key]
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise UnsupportedModelError(
                f"{self._name}.{key} differs between layers ({value}); moeflow reads files where it is one number."
            )
        return value[0]


def decoder_config(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Return the fields that any decoder has: sizes, heads, norms, rope, vocabulary, special ids."""
    heads = keys.one("attention.head_count")
    head_size = keys.get("attention.key_length", keys["embedding_length"] // heads)
    metadata = keys.metadata
    config = {
        "hidden_size": keys["embedding_length"],
        "num_hidden_layers": keys["block_count"] - keys.get("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.one("attention.head_count_kv", heads),
        "head_dim": head_size,
        "max_position_embeddings": keys["context_length"],
        "rope_parameters": rope_config(keys, tensors, head_size),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if (width := keys.get("feed_forward_length")) is not None:
        config["intermediate_size"] = keys.one("feed_forward_length") if isinstance(width, list) else width
    if (epsilon := keys.get("attention.layer_norm_rms_epsilon")) is not None:
        config["rms_norm_eps"] = epsilon
    return config


def rope_config(keys: Keys, tensors: Tensors, head_size: int) -> dict[str, Any]:
    """Return `rope_parameters`; what they cannot say is refused by name."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10000.0)}
    rotated = keys.get("rope.dimension_count", head_size)
    if rotated != head_size:
        rope["partial_rotary_factor"] = rotated / head_size
    scaling = keys.get("rope.scaling.type", "linear" if keys.get("rope.scale_linear") else "none")
    if scaling == "linear":
        factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0))
        if factor not in (0, 1):
            rope |= {"rope_type": "linear", "factor": factor}
    elif scaling == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": keys["rope.scaling.factor"],
            "original_max_position_embeddings": keys["rope.scaling.original_context_length"],
        }
    elif scaling != "none":
        raise UnsupportedModelError(f"the file scales its positions by {scaling!r}; moeflow reads linear and yarn.")
    if "rope_freqs.weight" in tensors:
        raise UnsupportedModelError("the file scales its positions by rope_freqs.weight, which moeflow does not read.")
    return rope


def decoder_metadata(config: Any, name: str) -> dict[str, Any]:
    """Return the keys of what `decoder_config` reads, from a config of transformers."""
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "vocab_size": config.vocab_size,
        **rope_metadata(config, head_size),
    }
    if getattr(config, "intermediate_size", None):
        keys["feed_forward_length"] = config.intermediate_size
    if getattr(config, "rms_norm_eps", None) is not None:
        keys["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    return {f"{name}.{key}": value for key, value in keys.items()}


def rope_metadata(config: Any, head_size: int) -> dict[str, Any]:
    """Return the keys of `rope_parameters`; what they cannot say is refused by name."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    keys: dict[str, Any] = {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_size * rope.get("partial_rotary_factor", 1.0)),
    }
    if kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "yarn":
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
    elif kind != "default":
        raise UnsupportedModelError(f"moeflow writes no GGUF files with positions scaled by {kind!r}.")
    return keys
