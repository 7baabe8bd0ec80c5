"""The file of a packed folder's dense tensors: safetensors, or GGUF where they come from one. Bytes as they are.

Knows files and places. Knows nothing of the order in which tensors are written.
"""

import errno
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from moeflow.checkpoint.gguf.writing import head as gguf_head
from moeflow.checkpoint.headers import SINGLE_FILE, TensorEntry
from moeflow.core import align_up

DENSE_GGUF = "dense.gguf"
_COPY_CHUNK_BYTES = 16 << 20


class DenseFile:
    """Where each dense tensor goes.

    Args:
        folder: of the file.
        tensors: by name, where they are read; they follow one another in this order.
        architecture: of the GGUF file that they come from; None for safetensors.

    Attributes:
        path: of the file.
        head: all that comes before the first tensor.
        num_bytes: of the whole file.
    """

    def __init__(self, folder: Path, tensors: dict[str, TensorEntry], architecture: str | None) -> None:
        if architecture is None:
            self.path = folder / SINGLE_FILE
            self.head, self._begins = _safetensors_head(tensors)
        else:
            self.path = folder / DENSE_GGUF
            self.head, self._begins = gguf_head(architecture, tensors)
        self.tensors = tensors
        ends = [self._begins[name] + entry.num_bytes for name, entry in tensors.items()]
        self.num_bytes = max(ends, default=len(self.head))

    def place(self, name: str) -> tuple[int, int]:
        """Return where a tensor begins, and its bytes."""
        return self._begins[name], self.tensors[name].num_bytes

    def copy(self, name: str, files: list[Path], target: BinaryIO, on_bytes: Callable[[int], None]) -> int:
        """Copy a tensor.

        Args:
            name: of it.
            files: the shards, by number.
            target: the file, open.
            on_bytes: called with the number of bytes that were copied.

        Returns:
            Their CRC-32.

        Raises:
            OSError: a disk is full or failed, or the shard is too short.
        """
        entry, value = self.tensors[name], 0
        left = entry.num_bytes
        target.seek(self._begins[name])
        with open(files[entry.file], "rb") as source:
            source.seek(entry.begin)
            while left:
                chunk = source.read(min(left, _COPY_CHUNK_BYTES))
                if not chunk:
                    raise OSError(errno.EIO, f"{files[entry.file]} ends early")
                target.write(chunk)
                value, left = zlib.crc32(chunk, value), left - len(chunk)
                on_bytes(len(chunk))
        target.flush()
        return value


def _safetensors_head(tensors: dict[str, TensorEntry]) -> tuple[bytes, dict[str, int]]:
    """Return all that comes before the first tensor of a safetensors file, and where each tensor begins."""
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    begins, position = {}, 0
    for name, entry in tensors.items():
        offsets = [position, position + entry.num_bytes]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        begins[name], position = position, offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(align_up(len(text), 8))
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + begin for name, begin in begins.items()}
