"""Metadata of a GGUF file: where each value lies in the header, and the value when it is asked for.

Knows kinds of values. Knows nothing of what a key means.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moeflow.checkpoint.gguf.header_bytes import HeaderBytes
from moeflow.errors import CheckpointError
from moeflow.formatting import brief

UINT32, STRING, ARRAY = 4, 8, 9
MAX_KEYS = 5_000  # a model has about sixty
MAX_KEY_BYTES = 512
MAX_DEPTH = 3  # of arrays in arrays
MAX_ARRAYS = 10_000  # in arrays
MAX_VALUE_BYTES = 100_000_000  # of one value as Python has it; 515,000 merges take 50 MB
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", UINT32: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_NUMBERS = {kind: struct.Struct(f"<{form}") for kind, form in _FORMS.items()}
_KIND, _LENGTH, _ARRAY = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<IQ")
_NUMBER_MEMORY, _TEXT_MEMORY, _LIST_MEMORY = 40, 84, 64  # at most, with the slot in a list
_LETTER_MEMORY = 4  # at most, for each byte of UTF-8


class _Place(NamedTuple):
    """Where a value lies: its kind, the offset of its first byte, and how much memory it takes at most."""

    kind: int
    begin: int
    memory: int


class Metadata(Mapping[str, Any]):
    """Values by their keys: int, float, bool, str, or lists of these.

    A value is decoded anew whenever it is asked for, so that a file that is opened for its tensors does not pay for its
    vocabulary: keep a list that you use more than once.

    Args:
        file: for errors.
        data: the header up to the end of the metadata.
        places: in `data`, as `read_metadata` found them.
    """

    def __init__(self, file: Path, data: bytes, places: dict[str, _Place]) -> None:
        self._file = file
        self._data = data
        self._places = places

    def __getitem__(self, key: str) -> Any:
        """Decode a value.

        Raises:
            KeyError: there is none.
            CheckpointError: a text is not UTF-8, or the value would take more memory than any model's.
        """
        kind, begin, memory = self._places[key]
        if memory > MAX_VALUE_BYTES:
            raise CheckpointError(
                f"{self._file}: key {brief(key)!r} would take up to {memory:,} bytes of memory, at most "
                f"{MAX_VALUE_BYTES:,} are allowed. Use a file from a source that you trust."
            )
        try:
            return _decoded(self._data, kind, begin)[0]
        except UnicodeDecodeError:
            raise CheckpointError(
                f"{self._file}: key {brief(key)!r} has a text that is not UTF-8. The header is damaged: download it "
                "again, and from a source that you trust."
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places  # without decoding it

    def __repr__(self) -> str:
        return f"Metadata({len(self)} keys of {self._file})"

    def kind(self, key: str) -> int | None:
        """Return the number of a value's kind in the format, None where there is no such key."""
        return self._places[key].kind if key in self._places else None


def read_metadata(reader: HeaderBytes, count: int) -> Metadata:
    """Find every value of the metadata, without decoding any.

    Args:
        reader: stands at the first key.
        count: how many keys the header announces.

    Raises:
        CheckpointError: a key or value cannot be; the message names it.
    """
    if count > MAX_KEYS:
        raise reader.fault(f"announces {count:,} keys, at most {MAX_KEYS:,} are allowed")
    places: dict[str, _Place] = {}
    scan = _Scan(reader)
    for number in range(count):
        reader.subject = f"key number {number + 1} of {count}"
        key = reader.text(MAX_KEY_BYTES)
        reader.subject = f"key {brief(key)!r}"
        if key in places:
            raise reader.fault("stands there twice")
        (kind,) = reader.take(_KIND)
        begin = reader.position
        places[key] = _Place(kind, begin, scan.over(kind))
    with memoryview(reader.data) as view:
        return Metadata(reader.file, bytes(view[: reader.position]), places)


class _Scan:
    """Goes over values."""

    def __init__(self, reader: HeaderBytes) -> None:
        self._reader = reader
        self._num_arrays = 0

    def over(self, kind: int, depth: int = 0) -> int:
        """Go over one value and return how many bytes of memory it takes at most."""
        reader = self._reader
        if kind in _NUMBERS:
            reader.skip(_NUMBERS[kind].size)
            return _NUMBER_MEMORY
        if kind == STRING:
            (length,) = reader.take(_LENGTH)
            reader.skip(length)
            return _TEXT_MEMORY + _LETTER_MEMORY * length
        if kind != ARRAY:
            raise reader.fault(f"has a value of kind number {kind}, which GGUF does not have")
        return self._over_array(depth + 1)

    def _over_array(self, depth: int) -> int:
        reader = self._reader
        kind, count = reader.take(_ARRAY)
        if kind in _NUMBERS:
            reader.skip(count * _NUMBERS[kind].size)
            return _LIST_MEMORY + _NUMBER_MEMORY * count
        if kind == STRING:
            return _LIST_MEMORY + _TEXT_MEMORY * count + _LETTER_MEMORY * reader.skip_texts(count)
        if kind != ARRAY:
            raise reader.fault(f"has an array of kind number {kind}, which GGUF does not have")
        self._num_arrays += count
        if depth == MAX_DEPTH or self._num_arrays > MAX_ARRAYS:
            raise reader.fault(
                f"has arrays in arrays, more than {MAX_DEPTH} deep or {MAX_ARRAYS:,} in number, which no model has"
            )
        return _LIST_MEMORY + sum(self.over(ARRAY, depth) for _ in range(count))


def _decoded(data: bytes, kind: int, begin: int) -> tuple[Any, int]:
    """Return the value that begins there, and where it ends; `_Scan` went over it before."""
    if kind in _NUMBERS:
        return _NUMBERS[kind].unpack_from(data, begin)[0], begin + _NUMBERS[kind].size
    if kind == STRING:
        texts, end = _decoded_texts(data, begin, 1)
        return texts[0], end
    kind, count = _ARRAY.unpack_from(data, begin)
    begin += _ARRAY.size
    if kind == STRING:
        return _decoded_texts(data, begin, count)
    if kind in _NUMBERS:
        form = struct.Struct(f"<{count}{_FORMS[kind]}")
        return list(form.unpack_from(data, begin)), begin + form.size
    values = []
    for _ in range(count):
        value, begin = _decoded(data, ARRAY, begin)
        values.append(value)
    return values, begin


def _decoded_texts(data: bytes, begin: int, count: int) -> tuple[list[str], int]:
    texts, unpack = [], _LENGTH.unpack_from
    for _ in range(count):
        (length,) = unpack(data, begin)
        begin += _LENGTH.size
        end = begin + length
        texts.append(data[begin:end].decode())
        begin = end
    return texts, begin
