"""Reads tensors of a GGUF file whole: their bytes, or the values that they stand for.

Knows places and types. Knows nothing of models.
"""

import math
import os
from functools import partial

import torch

from moeflow.checkpoint.gguf.file import GgufFile
from moeflow.dtypes import FLOAT_DTYPES
from moeflow.errors import CheckpointError, UnsupportedModelError
from moeflow.hf.gguf.architecture import Tensors
from moeflow.kernels.quantization.ggml import BLOCK_TYPES
from moeflow.kernels.quantization.ggml_values import block_values


def readers(file: GgufFile) -> Tensors:
    """Return what reads each tensor's values as float32, by name."""
    return {name: partial(_floats, file, name) for name in file.tensors}


def _floats(file: GgufFile, name: str) -> torch.Tensor:
    return read_values(file, name).float()


def read_values(file: GgufFile, name: str) -> torch.Tensor:
    """Return a tensor's values: in its own dtype where it has floats, else in float32.

    Args:
        file: the GGUF file.
        name: of the tensor.

    Raises:
        CheckpointError: the file cannot be read, or is shorter than its header says.
        UnsupportedModelError: of a type that moeflow does not know.
    """
    entry = file.tensors[name]
    return values_of(read_bytes(file, name), entry.dtype, f"{file.files[entry.file]}: {name}").view(entry.shape)


def values_of(raw: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """Return the values of rows of bytes.

    Args:
        raw: uint8 [.., bytes of a row].
        dtype: GGML's type.
        name: of the tensor, for the error.

    Raises:
        UnsupportedModelError: of a type that moeflow does not know.
    """
    if dtype in FLOAT_DTYPES:
        return raw.view(FLOAT_DTYPES[dtype])
    if not BLOCK_TYPES[dtype].format:
        raise UnsupportedModelError(f"{name} is stored as {dtype}, which moeflow does not read. Use another file.")
    return block_values(raw, BLOCK_TYPES[dtype].format)


def read_bytes(file: GgufFile, name: str) -> torch.Tensor:
    """Return a tensor's bytes, uint8 [rows, bytes of a row]. The pages are given up: each is read once.

    Args:
        file: the GGUF file.
        name: of the tensor.

    Raises:
        CheckpointError: the file cannot be read, or is shorter than its header says.
    """
    entry = file.tensors[name]
    raw = torch.empty(entry.num_bytes, dtype=torch.uint8)  # at an address that kernels are fast at
    path = file.files[entry.file]
    try:
        with open(path, "rb", buffering=0) as handle:
            handle.seek(entry.begin)
            view, done = raw.numpy().data, 0
            while done < len(view):
                count = handle.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{path} is shorter than its header says. Download it again.")
                done += count
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle.fileno(), entry.begin, entry.num_bytes, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return raw.view(math.prod(entry.shape[:-1]), -1)
