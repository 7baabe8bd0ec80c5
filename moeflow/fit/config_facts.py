"""What config.json says of a model's shape: routing, keys and values, dtype. transformers is not imported.

Knows names of fields. Knows nothing of weights.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from moeflow.errors import CheckpointError, ConfigError

_TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "num_selected_experts",
    "top_k",
)
_EXPERTS_NAMES = (
    "num_local_experts",
    "n_routed_experts",
    "num_experts",
    "moe_num_experts",
    "num_routed_experts",
)
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "ffn_config", "decoder")
# Fields that do not decide what a model is: packing and quantising change some, versions of transformers others.
_NOT_OF_THE_MODEL = {
    "architectures", "auto_map", "dtype", "quantization_config", "torch_dtype", "transformers_version", "use_cache",
    "_name_or_path",
}  # fmt: skip
_KINDS_NAMES = ("layer_types", "layers_block_type", "hybrid_override_pattern")
_PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}  # letters of hybrid_override_pattern
# Layers that keep a state of one size, or nothing.
_STATES = ("mamba", "linear_attention", "conv", "recurrent", "mlp", "moe")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
_MOST = 1 << 40  # of a number in a config


class Attention(NamedTuple):
    """What one position of context keeps.

    Args:
        values: [num_layers], numbers kept of a position; 0 where a layer keeps a state of one size.
        windows: [num_layers], positions that a layer keeps at most; 0 for all.
    """

    values: tuple[int, ...]
    windows: tuple[int, ...]


class ConfigFacts(NamedTuple):
    """The fields that sizes depend on.

    Args:
        model_type: of the config.
        fingerprint: 16 hexadecimal digits of the fields that make the model what it is.
        num_layers: of the decoder.
        num_experts: routed experts a layer; None where the config does not say.
        num_experts_per_tok: K.
        hidden_size: of the residual stream.
        vocab_size: of the head.
        dtype: safetensors name; None where the config does not say.
        context: positions the model was made for; None where the config does not say.
        is_quantized: whether the checkpoint holds weights in a format of its own.
        attention: what a position keeps.
    """

    model_type: str
    fingerprint: str
    num_layers: int
    num_experts: int | None
    num_experts_per_tok: int
    hidden_size: int
    vocab_size: int
    dtype: str | None
    context: int | None
    is_quantized: bool
    attention: Attention


def read_config(folder: Path) -> ConfigFacts:
    """Read config.json.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
        ConfigError: a number that sizes depend on is missing or none.
    """
    file = Path(folder) / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no config.json. Give a folder written by save_pretrained or the hub."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}). Download it again.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds a {type(found).__name__} where a JSON object belongs. Download it again.")
    return _facts(found, file)


def _facts(found: dict[str, Any], file: Path) -> ConfigFacts:
    fields = found | _text_part(found)
    experts = [value for name in _EXPERTS_NAMES if (value := _most(fields.get(name))) is not None]
    dtype = fields.get("dtype") or fields.get("torch_dtype")
    kinds = _layer_kinds(fields)
    layers = len(kinds) or _number(fields, file, "num_hidden_layers", "n_layers", "num_layers", "n_layer")
    return ConfigFacts(
        model_type=str(found.get("model_type", "unknown")),
        fingerprint=_fingerprint(found),
        num_layers=layers,
        num_experts=max(experts, default=None),
        num_experts_per_tok=max((n for name in _TOP_K_NAMES if (n := _most(fields.get(name)))), default=1),
        hidden_size=_number(fields, file, "hidden_size", "d_model", "n_embd"),
        vocab_size=_number(fields, file, "vocab_size"),
        dtype=_DTYPES.get(str(dtype).removeprefix("torch.")),
        context=_most(fields.get("max_position_embeddings")),
        is_quantized=bool(found.get("quantization_config") or fields.get("quantization_config")),
        attention=_attention(fields, kinds, layers, file),
    )


def _text_part(found: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the decoder's own config, where a model has parts; a part may have parts."""
    fields: dict[str, Any] = {}
    for name in _TEXT_PARTS:
        part = found.get(name)
        if isinstance(part, dict):
            fields |= {key: value for key, value in part.items() if value is not None} | _text_part(part)
    return fields


def _layer_kinds(fields: dict[str, Any]) -> list[str]:
    """Return what each layer is, where the config lists it; else nothing."""
    layers = _most(fields.get("num_hidden_layers"))
    for name in _KINDS_NAMES:
        kinds = fields.get(name)
        if isinstance(kinds, (list, str)) and kinds and layers in (None, len(kinds)):
            return [_PATTERN.get(str(kind), str(kind)) for kind in kinds]
    return []


def _attention(fields: dict[str, Any], kinds: list[str], layers: int, file: Path) -> Attention:
    latent = _most(fields.get("kv_lora_rank"))
    if latent:
        values = latent + (_most(fields.get("qk_rope_head_dim")) or 0)
    else:
        heads = _number(fields, file, "num_attention_heads", "n_heads", "n_head")
        hidden = _number(fields, file, "hidden_size", "d_model", "n_embd")
        head_dim = _most(fields.get("head_dim")) or hidden // max(heads, 1)
        key_heads = _most(fields.get("num_key_value_heads")) or heads
        values = key_heads * (head_dim + (_most(fields.get("v_head_dim")) or head_dim))
    if not kinds:
        slides = fields.get("sliding_window") and fields.get("use_sliding_window", True)
        kinds = ["sliding_attention" if slides else "full_attention"] * layers
    sizes = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    windows = tuple(_most(fields.get(sizes.get(str(kind), ""))) or 0 for kind in kinds)
    kept = tuple(0 if any(state in str(kind) for state in _STATES) else values for kind in kinds)
    return Attention(kept, windows)


def _most(value: Any) -> int | None:
    """Return a whole number above 0, the largest of a list; None for anything else."""
    values = [one for one in (value if isinstance(value, list) else [value]) if type(one) is int and 0 < one < _MOST]
    return max(values, default=None)


def _number(fields: dict[str, Any], file: Path, *names: str) -> int:
    found = next((value for name in names if (value := _most(fields.get(name))) is not None), None)
    if found is None:
        given = {name: fields[name] for name in names if name in fields}
        raise ConfigError(f"{file}: {names[0]} is {given or 'missing'}; it must be a whole number. Correct it.")
    return found


def _fingerprint(found: dict[str, Any]) -> str:
    """Hash what a packed or quantised folder has in common with the checkpoint it was made of."""
    kept = {name: value for name, value in found.items() if name not in _NOT_OF_THE_MODEL and value is not None}
    for name in _TEXT_PARTS:
        if isinstance(kept.get(name), dict):
            kept[name] = {key: value for key, value in kept[name].items() if key not in _NOT_OF_THE_MODEL}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
