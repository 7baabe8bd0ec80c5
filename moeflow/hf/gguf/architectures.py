"""The architectures of GGUF that moeflow reads and writes, by the name in the file.

Knows the families' files. Knows nothing of tensors.
"""

from typing import Any

from moeflow.errors import UnsupportedModelError
from moeflow.hf.gguf.architecture import Architecture
from moeflow.hf.gguf.families import deepseek, delta_net, glm, gpt_oss, llama, mamba, others, qwen, short_conv, sliding

_ALL = (
    llama.LLAMA,
    llama.GRANITEMOE,
    qwen.QWEN2MOE,
    qwen.QWEN3MOE,
    gpt_oss.GPT_OSS,
    others.OLMOE,
    others.PHIMOE,
    others.MINIMAX_M2,
    others.ERNIE4_5_MOE,
    others.HUNYUAN_MOE,
    deepseek.DEEPSEEK2,
    glm.GLM4MOE,
    glm.DOTS1,
    sliding.EXAONE_MOE,
    sliding.AFMOE,
    delta_net.QWEN3NEXT,
    delta_net.QWEN35MOE,
    short_conv.LFM2MOE,
    mamba.NEMOTRON_H_MOE,
)
ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in _ALL}


def find_architecture(name: str) -> Architecture:
    """Return the architecture that a file names.

    Args:
        name: `general.architecture`.

    Raises:
        UnsupportedModelError: moeflow does not know it.
    """
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"no reader for GGUF files of the architecture {name!r}; moeflow reads {', '.join(sorted(ARCHITECTURES))}. "
            "Take the model's folder of safetensors instead."
        )
    return ARCHITECTURES[name]


def architecture_of(config: Any) -> Architecture:
    """Return the architecture that a config of transformers is written as.

    Args:
        config: the model's.

    Raises:
        UnsupportedModelError: moeflow does not write it.
    """
    found = [
        entry
        for entry in ARCHITECTURES.values()
        if config.model_type in (entry.model_type, *entry.also) and entry.metadata
    ]
    if not found:
        known = sorted(
            {kind for entry in ARCHITECTURES.values() if entry.metadata for kind in (entry.model_type, *entry.also)}
        )
        raise UnsupportedModelError(
            f"moeflow writes no GGUF files of {config.model_type} models; it writes {', '.join(known)}."
        )
    return found[0]
