"""Rotary positions: `rope_parameters` of config.json, and the keys and tensors that a GGUF file has in their place.

What one of them cannot say is refused by name, never left out. Knows keys and factors. Knows nothing of weights.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from moeflow.errors import UnsupportedModelError
from moeflow.hf.gguf.architecture import Tensors

LONG, SHORT, FREQUENCIES = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"


class _Keys(Protocol):
    def __getitem__(self, key: str) -> Any: ...

    def get(self, key: str, default: Any = None) -> Any: ...


def rope_config(keys: _Keys, tensors: Tensors, head_size: int, *, truncates: bool = True) -> dict[str, Any]:
    """Return `rope_parameters`.

    Args:
        keys: of the architecture.
        tensors: of the file; factors of the frequencies are read.
        head_size: of the keys, of which `rope.dimension_count` may be a part.
        truncates: whether yarn's range is of whole dimensions, as llama.cpp has it for every model.

    Raises:
        UnsupportedModelError: positions are scaled in a way that transformers does not have.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10000.0)}
    rotated = keys.get("rope.dimension_count", head_size)
    if rotated != head_size:
        rope["partial_rotary_factor"] = rotated / head_size
    kind = keys.get("rope.scaling.type", "linear")
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear")) or 1.0
    attention = keys.get("rope.scaling.attn_factor", 1.0)
    factors = [name for name in (LONG, SHORT, FREQUENCIES) if name in tensors]
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedModelError(f"rope.scaling.type is {kind!r}; moeflow reads linear, yarn and longrope.")
    if keys.get("rope.scaling.alpha") or (factors and (kind == "yarn" or (kind == "linear" and factor != 1))):
        raise UnsupportedModelError(
            f"positions are scaled in two ways ({', '.join(['rope.scaling', *factors])}); moeflow reads one."
        )
    if kind == "yarn":
        return rope | _read_yarn(keys, factor, attention, truncates)
    if factors:
        short, long = (name if name in tensors else FREQUENCIES for name in (SHORT, LONG))
        original = keys.get("rope.scaling.original_context_length", keys["context_length"])
        return rope | {
            "rope_type": "longrope",
            "factor": keys["context_length"] / original,
            "short_factor": tensors[short]().tolist(),
            "long_factor": tensors[long]().tolist(),
            "original_max_position_embeddings": original,
            "attention_factor": attention,
        }
    if attention != 1:
        raise UnsupportedModelError(f"rope.scaling.attn_factor is {attention} without yarn or longrope.")
    return rope | ({"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1 else {})


def _read_yarn(keys: _Keys, factor: float, attention: float, truncates: bool) -> dict[str, Any]:
    usual = magnitude = _yarn_magnitude(factor)
    if multiplier := keys.get("rope.scaling.yarn_log_multiplier"):
        magnitude /= _yarn_magnitude(factor, multiplier)
    if keys.get("rope.scaling.yarn_ext_factor", 1.0) not in (1, -1):
        raise UnsupportedModelError("rope.scaling.yarn_ext_factor is not 1, which transformers' yarn always has.")
    rope = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys["rope.scaling.original_context_length"],
        "beta_fast": keys.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.get("rope.scaling.yarn_beta_slow", 1.0),
    }
    if not truncates:
        rope["truncate"] = False
    if not math.isclose(magnitude * attention, usual, rel_tol=1e-6):  # float32 in the file
        rope["attention_factor"] = magnitude * attention
    return rope


def _yarn_magnitude(factor: float, multiplier: float = 1.0) -> float:
    """Return what yarn multiplies cosines and sines with, unless it is told."""
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1


def rope_metadata(
    config: Any, head_size: int, *, factors: tuple[str, ...] = (), truncates: bool = True
) -> dict[str, Any]:
    """Return the keys of a config's `rope_parameters`.

    Args:
        config: of transformers.
        head_size: of the keys.
        factors: the kinds of scaling that llama.cpp computes with factors in tensors, for this architecture: of
            "longrope" and "llama3".
        truncates: as in `rope_config`.

    Raises:
        UnsupportedModelError: llama.cpp would compute other positions.
    """
    rope: Mapping[str, Any] = config.rope_parameters
    kind = rope.get("rope_type", "default")
    keys: dict[str, Any] = {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_size * rope.get("partial_rotary_factor", 1.0)),
    }
    if kind == "default" or (kind == "llama3" and kind in factors):
        return keys
    if kind == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn" and rope.get("truncate", True) == truncates:
        return keys | _write_yarn(config, rope)
    if kind == "longrope" and kind in factors:
        return keys | {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": _original_length(config, rope),
            "rope.scaling.attn_factor": _long_magnitude(config, rope),
        }
    raise UnsupportedModelError(
        f"the model's positions are scaled ({kind}) as llama.cpp does not scale them for {config.model_type}: a GGUF "
        "file would give other answers. moeflow writes this one as folders alone: see moeflow pack."
    )


def _write_yarn(config: Any, rope: Mapping[str, Any]) -> dict[str, Any]:
    factor = float(rope.get("factor") or config.max_position_embeddings / _original_length(config, rope))
    magnitude = rope.get("attention_factor")
    if magnitude is None:
        magnitude = _yarn_magnitude(factor)
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            magnitude = _yarn_magnitude(factor, rope["mscale"]) / _yarn_magnitude(factor, rope["mscale_all_dim"])
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": _original_length(config, rope),
        "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
    }
    if not math.isclose(magnitude, _yarn_magnitude(factor), rel_tol=1e-9):
        keys["rope.scaling.attn_factor"] = magnitude / _yarn_magnitude(factor)
    return keys


def _original_length(config: Any, rope: Mapping[str, Any]) -> int:
    found = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return found or config.max_position_embeddings


def _long_magnitude(config: Any, rope: Mapping[str, Any]) -> float:
    """Return what longrope multiplies cosines and sines with."""
    short, long = rope.get("short_mscale"), rope.get("long_mscale")  # Phi's own: one for each list of factors
    if short is not None:
        if short != long:
            raise UnsupportedModelError(f"short_mscale is {short}, long_mscale {long}; a GGUF file holds one number.")
        return float(short)
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = _original_length(config, rope)
    factor = rope.get("factor") or config.max_position_embeddings / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def rope_tensors(config: Any, head_size: int) -> dict[str, torch.Tensor]:
    """Return the tensors of factors, [rotated dimensions / 2] float32, that go with `rope_metadata`."""
    rope: Mapping[str, Any] = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return {LONG: torch.tensor(rope["long_factor"]), SHORT: torch.tensor(rope["short_factor"])}
    if rope.get("rope_type") == "llama3":
        return {FREQUENCIES: _llama3_factors(rope, int(head_size * rope.get("partial_rotary_factor", 1.0)))}
    return {}


def _llama3_factors(rope: Mapping[str, Any], rotated: int) -> torch.Tensor:
    frequencies = rope["rope_theta"] ** -(torch.arange(0, rotated, 2) / rotated)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 1: of a frequency that stays
    return 1 / ((1 - share) / rope["factor"] + share)
