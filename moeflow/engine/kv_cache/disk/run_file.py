"""Files of single runs: safetensors that tell in their metadata whose keys and values they hold.

They are written a megabyte and read a tensor at a time, so that no budget is exceeded. The safetensors package writes
what is in memory as a whole, and what it reads is a map of the file; it can read these files as well.

Knows runs, tensors and files. Knows nothing of trees, limits or threads.
"""

import json
import threading
import zlib
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch.utils.weak import TensorWeakRef

from moeflow.atomic_file import NO_CHECKSUM, atomic_file
from moeflow.engine.kv_cache.kept import run_tensors
from moeflow.engine.kv_cache.kept.kept_runs import Run
from moeflow.engine.kv_cache.kept.run_tensors import Layout
from moeflow.engine.kv_cache.windows import Stretch

_FORMAT = "moeflow kept run, version 1"
_PLACE = b'"crc32": "'
_COPIED_BYTES = 1 << 20  # that a writer has of a run
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}


class RunRow(NamedTuple):
    """What a file tells of its run.

    Args:
        scaling: of its keys.
        before: the tokens that lead to it.
        tokens: its own.
        parts: what is kept of it in layers with a window, in their order.
    """

    scaling: Hashable
    before: list[int]
    tokens: list[int]
    parts: list[Stretch]


class LeavingRun(NamedTuple):
    """A run that may leave memory before it is written: its tensors are not held.

    Args:
        row: what is told of it.
        tensors: by their names.
        written: is set once nothing more will be written of it.
    """

    row: RunRow
    tensors: dict[str, TensorWeakRef]
    written: threading.Event

    @classmethod
    def of(cls, run: Run) -> "LeavingRun":
        """Hold none of a run's tensors."""
        parts = sorted((part.begin, part.end) for part in run.parts)
        row = RunRow(run.scaling, list(run.before), list(run.tokens), parts)
        tensors = {name: TensorWeakRef(tensor) for name, tensor in run_tensors.named(run).items()}
        return cls(row, tensors, threading.Event())


class CopiedPiece:
    """Memory for a piece of a tensor that is about to be written, taken while the tensor is held for no longer.

    Args:
        copying: held while a piece is copied. Whoever releases tensors and then holds it knows that they are gone.
    """

    def __init__(self, copying: threading.Lock) -> None:
        self._copying = copying
        self._memory = torch.empty(_COPIED_BYTES, dtype=torch.uint8)

    def pieces(self, weak: TensorWeakRef, num_bytes: int) -> Iterator[memoryview]:
        """Yield a tensor's bytes, each piece in the same memory.

        Raises:
            _GoneError: the tensor has been released.
        """
        for begin in range(0, num_bytes, _COPIED_BYTES):
            piece = self._memory[: min(_COPIED_BYTES, num_bytes - begin)]
            with self._copying:
                if (tensor := weak()) is None:
                    raise _GoneError
                piece.copy_(tensor.view(torch.uint8).view(-1)[begin : begin + len(piece)])
                del tensor
            yield piece.numpy().data


class _GoneError(Exception):
    """The run has left, or nobody wants its file any more."""


def file_bytes(model: str, row: RunRow, layout: Layout) -> int:
    """Return the bytes of a run's file."""
    return len(_header(model, row, layout)) + data_bytes(row, layout)


def data_bytes(row: RunRow, layout: Layout) -> int:
    """Return the bytes of a run's tensors."""
    plain, windowed = (
        sum(shape.position_bytes for shape in some(layout).values())
        for some in (run_tensors.plain_layers, run_tensors.windowed_layers)
    )
    return plain * len(row.tokens) + windowed * sum(end - begin for begin, end in row.parts)


def write_run(
    path: Path, model: str, run: LeavingRun, layout: Layout, copied: CopiedPiece, is_wanted: Callable[[], bool]
) -> bool:
    """Write a run's file, holding none of its tensors; return False, and leave none, where the run has left.

    Args:
        path: the file.
        model: the fingerprint of its model.
        run: what is written.
        layout: the layers that keep keys and values, by their number.
        copied: where its pieces lie.
        is_wanted: asked before each piece whether to go on.

    Raises:
        OSError: the file cannot be written; nothing is left of it.
    """
    header = _header(model, run.row, layout)
    try:
        with atomic_file(path, None) as partial, open(partial, "wb") as file:
            file.write(header)
            crc32 = zlib.crc32(header)
            for name, (shape, dtype, _) in run_tensors.wanted(len(run.row.tokens), run.row.parts, layout).items():
                for piece in copied.pieces(run.tensors[name], torch.Size(shape).numel() * dtype.itemsize):
                    if not is_wanted():
                        raise _GoneError
                    file.write(piece)
                    crc32 = zlib.crc32(piece, crc32)
            file.seek(header.index(_PLACE) + len(_PLACE))
            file.write(f"{crc32:08x}".encode())
    except _GoneError:
        return False
    return True


def read_row(path: Path, model: str, layout: Layout) -> RunRow:
    """Return what a file tells of its run, by its header alone.

    Raises:
        ValueError: it is damaged, cut short or of another model.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        row, header, _ = _read_header(file, model, layout)
    if path.stat().st_size != len(header) + data_bytes(row, layout):
        raise ValueError("it is cut short")
    return row


def read_run(path: Path, model: str, layout: Layout) -> Run:
    """Read a run.

    Raises:
        ValueError: the file is damaged, cut short or of another model.
        OSError: it cannot be read.
        RuntimeError: there is no memory.
    """
    tensors: dict[str, torch.Tensor] = {}
    with open(path, "rb") as file:
        row, header, wanted_crc32 = _read_header(file, model, layout)
        crc32 = zlib.crc32(header)
        for name, (shape, dtype, device) in run_tensors.wanted(len(row.tokens), row.parts, layout).items():
            tensor = torch.empty(shape, dtype=dtype)
            content = tensor.view(torch.uint8).numpy().data.cast("B")
            if file.readinto(content) != len(content):  # type: ignore[attr-defined]
                raise ValueError("it is cut short")
            crc32 = zlib.crc32(content, crc32)
            tensors[name] = tensor.to(device)
    if crc32 != wanted_crc32:
        raise ValueError("its checksum is another")
    return Run(row.scaling, row.before, row.tokens, *run_tensors.kept_of(tensors, len(row.tokens), row.parts, layout))


def _header(model: str, row: RunRow, layout: Layout) -> bytes:
    """Return all bytes before the tensors', with no checksum yet: they depend on nothing else."""
    run = json.dumps([row.scaling, row.before, row.tokens, row.parts])
    header: dict[str, Any] = {"__metadata__": {"crc32": NO_CHECKSUM, "format": _FORMAT, "model": model, "run": run}}
    end = 0
    for name, (shape, dtype, _) in run_tensors.wanted(len(row.tokens), row.parts, layout).items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _read_header(file: BinaryIO, model: str, layout: Layout) -> tuple[RunRow, bytes, int]:
    """Return the row, the header as it was before its checksum was known, and this checksum."""
    begin = file.read(8)
    length = int.from_bytes(begin, "little")
    if len(begin) < 8 or length > 100_000_000:  # the most that safetensors allows
        raise ValueError("it has no header")
    content = file.read(length)
    try:
        told = json.loads(content)["__metadata__"]
        scaling, before, tokens, parts = json.loads(told["run"])
        crc32 = int(told["crc32"], 16)
        scaling = None if scaling is None else tuple(scaling)
        row = RunRow(scaling, before, tokens, [(first, last) for first, last in parts])
        if not all(type(token) is int and 0 <= token < 1 << 62 for token in before + tokens):
            raise TypeError("what should be tokens is something else")
        header = _header(model, row, layout)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its header is damaged ({error})") from error
    place = header.index(_PLACE) + len(_PLACE)
    found = begin + content
    if found[:place] + NO_CHECKSUM.encode() + found[place + len(NO_CHECKSUM) :] != header:
        raise ValueError("it is damaged or of another model")
    return row, header, crc32
