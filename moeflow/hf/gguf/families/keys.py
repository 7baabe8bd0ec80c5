"""The keys of a GGUF file's metadata that most architectures share, and the fields of config.json they become.

Knows keys and fields. Knows nothing of tensors' values.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from moeflow.errors import UnsupportedModelError
from moeflow.hf.gguf.architecture import Tensors
from moeflow.hf.gguf.families.rope import rope_config, rope_metadata

SOFTMAX, SIGMOID = 1, 2  # expert_gating_func
_MISSING = object()


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
        """Return a value, or the default where the file has no such key."""
        return self.metadata.get(f"{self._name}.{key}", default)

    def one(self, key: str, default: Any = _MISSING) -> Any:
        """Return a value that files may give for each layer, where all layers must have the same.

        Raises:
            UnsupportedModelError: they differ.
        """
        value = self[key] if default is _MISSING else self.get(key, default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise UnsupportedModelError(
                f"{self._name}.{key} differs between layers ({value}); moeflow reads files where it is one number."
            )
        return value[0]


def decoder_config(keys: Keys, tensors: Tensors, *, truncates: bool = True) -> dict[str, Any]:
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
        "rope_parameters": rope_config(keys, tensors, head_size, truncates=truncates),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),  # as many as the embedding has rows: llama.cpp wants it
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if keys.get("feed_forward_length") is not None:
        config["intermediate_size"] = keys.one("feed_forward_length")
    if keys.get("attention.layer_norm_rms_epsilon") is not None:
        config["rms_norm_eps"] = keys["attention.layer_norm_rms_epsilon"]
    return config


def experts_config(keys: Keys, *, count: str, used: str, width: str | None = None) -> dict[str, Any]:
    """Return the fields of routed experts, under the names that the family gives them.

    Args:
        keys: of the architecture.
        count: the field of the number of experts.
        used: the field of the experts of a token.
        width: the field of an expert's width, where it is not the dense MLP's.

    Raises:
        UnsupportedModelError: the file scales the experts' weights, routes in groups, or has values of another size
            than keys, and the family does not.
    """
    for key, usual in (("expert_weights_scale", (0, 1)), ("expert_group_count", (0, 1))):
        if keys.get(key, 0) not in usual:
            raise UnsupportedModelError(f"{key} is {keys[key]}, which this architecture has not in transformers.")
    head_size = keys.get("attention.key_length", keys["embedding_length"] // keys.one("attention.head_count"))
    if keys.get("attention.value_length", head_size) != head_size:
        raise UnsupportedModelError(f"values have {keys['attention.value_length']} dimensions, keys {head_size}.")
    config = {count: keys["expert_count"], used: keys.one("expert_used_count")}
    return config | ({} if width is None else {width: keys.one("expert_feed_forward_length")})


def head_size_of(config: Any) -> int:
    """Return the size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def decoder_metadata(
    config: Any,
    name: str,
    more: Mapping[str, Any] = MappingProxyType({}),
    *,
    factors: tuple[str, ...] = (),
    truncates: bool = True,
) -> dict[str, Any]:
    """Return the keys of what `decoder_config` reads.

    Args:
        config: of transformers.
        name: of the architecture, put in front of each key.
        more: the architecture's own keys.
        factors: see `rope_metadata`.
        truncates: likewise.

    Raises:
        UnsupportedModelError: llama.cpp would compute something else.
    """
    head_size = head_size_of(config)
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "vocab_size": config.vocab_size,
        **rope_metadata(config, head_size, factors=factors, truncates=truncates),
    }
    if getattr(config, "intermediate_size", None):
        keys["feed_forward_length"] = config.intermediate_size
    if getattr(config, "rms_norm_eps", None) is not None:
        keys["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    return {f"{name}.{key}": value for key, value in {**keys, **more}.items()}


def refuse(config: Any, field: str, *usual: Any) -> None:
    """Refuse a config whose field is not as llama.cpp computes it for the family.

    Args:
        config: of transformers.
        field: its name; a config without it is as usual.
        *usual: the values that llama.cpp computes.

    Raises:
        UnsupportedModelError: another value.
    """
    value = getattr(config, field, usual[0])
    if value not in usual:
        raise UnsupportedModelError(
            f"{field} is {value!r}; llama.cpp computes {config.model_type} as if it were {usual[0]!r}, so that a GGUF "
            "file would give other answers."
        )


def refuse_window(config: Any) -> None:
    """Refuse a config with an attention window that is shorter than the context."""
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        refuse(config, "sliding_window", None)


def refuse_other_width(config: Any) -> None:
    """Refuse a config whose heads together are not as wide as the model, which llama.cpp takes for granted here."""
    width = config.num_attention_heads * head_size_of(config)
    if width != config.hidden_size:
        raise UnsupportedModelError(
            f"attention heads are {width} wide together, and hidden_size is {config.hidden_size}; llama.cpp wants them "
            f"the same in {config.model_type} models."
        )


def refuse_dense_layers(config: Any) -> None:
    """Refuse a config with layers without experts among the others, which llama.cpp does not have for the family."""
    refuse(config, "mlp_only_layers", [], None)
    refuse(config, "decoder_sparse_step", 1)
