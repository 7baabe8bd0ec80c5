"""The head of a GGUF file that holds some of another's tensors: their names, shapes, types and places.

A file of weights alone: config and tokenizer lie beside it, so that of metadata it has the architecture's name only.
"""

import struct
from collections.abc import Mapping

from moeflow.checkpoint.gguf.file import ARCHITECTURE_KEY
from moeflow.checkpoint.headers import TensorEntry
from moeflow.core import align_up
from moeflow.kernels.quantization.ggml import BLOCK_TYPES

ALIGNMENT = 32  # of a tensor in a file that names no other
_MAGIC, _VERSION, _TEXT = b"GGUF", 3, 8


def head(architecture: str, tensors: Mapping[str, TensorEntry]) -> tuple[bytes, dict[str, int]]:
    """Return all that comes before the first tensor, and where each tensor begins.

    Args:
        architecture: as GGUF names it.
        tensors: by name, with GGML's types; they follow in this order, each at a multiple of `ALIGNMENT`.
    """
    offsets, position, infos = {}, 0, b""
    for name, entry in tensors.items():
        sizes = struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *reversed(entry.shape))
        infos += _text(name) + sizes + struct.pack("<IQ", BLOCK_TYPES[entry.dtype].number, position)
        offsets[name] = position
        position = align_up(position + entry.num_bytes, ALIGNMENT)
    metadata = _text(ARCHITECTURE_KEY) + struct.pack("<I", _TEXT) + _text(architecture)
    text = _MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), 1) + metadata + infos
    text = text.ljust(align_up(len(text), ALIGNMENT), b"\0")
    return text, {name: len(text) + offset for name, offset in offsets.items()}


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()
