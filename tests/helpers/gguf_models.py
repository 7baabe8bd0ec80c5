"""Tiny models as GGUF files in any of GGML's types, and in transformers with the values of their blocks.

The values are gguf's own, so that nothing here reads a block as moeflow does.
"""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from moeflow.convert.gguf import add_keys
from moeflow.hf.experts_interface import expert_parameters
from moeflow.hf.gguf.architectures import find_architecture
from moeflow.hf.gguf.feeding import Fed, feed

SCALES = {  # where a block has float16 scales, in bytes
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "IQ3_S": [0], "IQ2_XS": [0],
}  # fmt: skip
FLOATS = {"F32": np.float32, "F16": np.float16}


def random_blocks(name: str, shape: tuple[int, ...], rng: np.random.Generator, size: float = 0.02) -> np.ndarray:
    """Return blocks of a type with any codes and small scales, uint8 [.., bytes of a row]."""
    kind = gguf.GGMLQuantizationType[name]
    values, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    assert shape[-1] % values == 0, (name, shape)
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // values, num_bytes), dtype=np.uint8)
    if name == "MXFP4":
        blocks[..., 0] = rng.integers(119, 123, blocks.shape[:-1])
    for place in SCALES.get(name, []):
        scale = (rng.random(blocks.shape[:-1]) + 0.5) * size / (8 if name.endswith(("_K", "XS", "_S")) else 4)
        blocks[..., place : place + 2] = scale.astype("<f2")[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


class _Everything(set):
    """Holds whatever is asked for, and lists nothing."""

    def __contains__(self, name: object) -> bool:
        return True


def write_model(
    path: Path,
    architecture: str,
    model: transformers.PreTrainedModel,
    type_of: Callable[[str, tuple[int, ...]], str],
    *,
    seed: int = 0,
) -> transformers.PreTrainedModel:
    """Write a model as a GGUF file, and return it with the values that the file stands for.

    Args:
        path: of the file.
        architecture: its name in GGUF.
        model: of that architecture, in float32; where the file has blocks, its weights become their values.
        type_of: (name of a tensor in the file, its shape) -> GGML's type.
        seed: of the blocks.
    """
    known, rng, config = find_architecture(architecture), np.random.default_rng(seed), model.config
    assert known.metadata is not None, architecture
    writer = gguf.GGUFWriter(path, architecture)
    add_keys(writer, known.metadata(config))
    _add_words(writer, config.vocab_size)
    state = model.state_dict()
    experts = expert_parameters(model)
    names = [name for name in state if name not in model.all_tied_weights_keys]
    for name, fed in feed(known, config, names, _Everything()).items():
        is_expert = name in experts
        made = _cut(state[name], fed) if is_expert else fed.rule.change.write(state[name], config)
        read = []
        for tensor, value in zip(fed.tensors, made, strict=True):
            kind = type_of(tensor, tuple(value.shape))
            if kind in FLOATS:
                data = value.numpy().astype(FLOATS[kind])
                writer.add_tensor(tensor, data)
                read.append(torch.from_numpy(data.astype(np.float32)))
            else:
                data, raw = random_blocks(kind, tuple(value.shape), rng), gguf.GGMLQuantizationType[kind]
                writer.add_tensor(tensor, data, raw_dtype=raw)
                read.append(torch.from_numpy(gguf.quants.dequantize(data, raw)).view(value.shape))
        state[name].copy_(_joined(read, fed) if is_expert else fed.rule.change.read(read, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_words(writer: gguf.GGUFWriter, count: int) -> None:
    """Write a byte-level tokenizer of single bytes and one pair, filled up with words that no text has."""
    alphabet = [*dict.fromkeys(bytes_to_unicode().values()), "ab"]
    words = [*alphabet, *(f"<{number}>" for number in range(count))][:count]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    kinds = [gguf.TokenType.NORMAL if number < len(alphabet) else gguf.TokenType.CONTROL for number in range(count)]
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])


def _cut(parameter: torch.Tensor, fed: Fed) -> list[torch.Tensor]:
    """Cut experts [E, N, ..] into the file's stacks."""
    count = len(fed.tensors)
    if fed.rule.interleaves:
        return [parameter[:, part::count].contiguous() for part in range(count)]
    return [part.contiguous() for part in parameter.chunk(count, dim=1)]


def _joined(tensors: list[torch.Tensor], fed: Fed) -> torch.Tensor:
    """Join the file's stacks to experts [E, N, ..]."""
    return torch.stack(tensors, dim=2).flatten(1, 2) if fed.rule.interleaves else torch.cat(tensors, dim=1)
