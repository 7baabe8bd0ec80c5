"""GGUF files: real ones, written by the package gguf, and headers of any bytes whatever."""

import struct
from pathlib import Path

import gguf
import numpy as np

TYPES = gguf.GGMLQuantizationType
_NUMPY = {TYPES.F32: np.float32, TYPES.F16: np.float16, TYPES.F64: np.float64, TYPES.I32: np.int32}


class Typed:
    """A value of metadata whose kind gguf is not to guess, such as `Typed(5, gguf.GGUFValueType.UINT16)`."""

    def __init__(self, value, kind, element=None):
        self.value, self.kind, self.element = value, kind, element


def random_tensor(shape, kind=TYPES.F32, *, seed=0):
    """Return (bytes or numbers, type) of a tensor of any type: its blocks are random bytes, so are their scales."""
    rng = np.random.default_rng(seed)
    if kind in _NUMPY:
        return rng.integers(-8, 8, shape).astype(_NUMPY[kind]), kind
    values, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    return rng.integers(0, 256, (*shape[:-1], shape[-1] // values * num_bytes), np.uint8), kind


def write_gguf(file, tensors, metadata=None, *, architecture="qwen3moe", alignment=None, tensors_a_split=0):
    """Write a GGUF file with the package gguf.

    Args:
        file: to be written; splits get their numbers behind its stem.
        tensors: {name: array, or (array, type)}; arrays of bytes are blocks [.., bytes].
        metadata: {key: value}; int, float, bool, str, a list of these, or `Typed`.
        tensors_a_split: at most so many in one file; 0 for one file.

    Returns:
        The paths of the files.
    """
    file = Path(file)
    writer = gguf.GGUFWriter(file, architecture, split_max_tensors=tensors_a_split)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    for name, tensor in tensors.items():
        array, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    files = [Path(handle.name) for handle in writer.fout]
    writer.close()
    return files


def _add(writer, key, value):
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    if isinstance(value, Typed):
        writer.add_key_value(key, value.value, value.kind, value.element)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        kinds[type(value)](key, value)


def text(value):
    """Return a text as the format has it."""
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def array(kind, count, data=b""):
    """Return an array as the format has it; `count` is what it says, `data` what it has."""
    return struct.pack("<IQ", kind, count) + data


def tensor(name, shape=(4,), kind=0, offset=0):
    """Return what a header says of a tensor; `shape` is in torch's order."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + dims + struct.pack("<IQ", kind, offset)


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("qwen3moe")


def key(name, kind, value):
    """Return a key with its value; `kind` is the value's number in the format, `value` its bytes."""
    return text(name) + struct.pack("<I", kind) + value


def split_keys(number, count, num_tensors):
    """Return the keys of a split."""
    numbers = ((b"no", number), (b"count", count), (b"tensors.count", num_tensors))
    return [key(b"split." + name, 5, struct.pack("<i", value)) for name, value in numbers]


def header(keys=(ARCHITECTURE,), tensors=(), *, version=3, num_keys=None, num_tensors=None, data=64, alignment=32):
    """Return a file of any keys, tensors and counts, whether they fit or not, and `data` bytes of tensors."""
    counts = len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys
    content = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*keys, *tensors])
    return content + bytes(-len(content) % alignment) + bytes(index % 251 for index in range(data))


def large_vocabulary(num_tokens=150_000, num_merges=150_000):
    """Return metadata of a tokenizer of that size."""
    tokens = [f"\u0120tok{number}" for number in range(num_tokens)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * num_tokens,
        "tokenizer.ggml.merges": [f"\u0120t {number}" for number in range(num_merges)],
    }
