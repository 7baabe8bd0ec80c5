"""The first bytes of a GGUF file, read as far as its header goes and never further than a header may go.

Knows numbers and texts of the format. Knows nothing of what they mean.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

from moeflow.errors import CheckpointError

MAX_HEADER_BYTES = 48_000_000  # three times that of a vocabulary of 262,000 tokens with its 515,000 merges
_FIRST_BYTES = 1 << 16  # most splits' headers are smaller
_LENGTH = struct.Struct("<Q")


class HeaderBytes:
    """Values one after another from the beginning of a file.

    Args:
        file: its name, for errors.
        handle: stands at its beginning.
        size: of the file, in bytes.

    Attributes:
        data: what was read so far, never more than `MAX_HEADER_BYTES`.
        position: where the next value begins.
        subject: of the errors, such as "key 'general.name'".
    """

    def __init__(self, file: Path, handle: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size
        self.data = bytearray()
        self.position = 0
        self.subject = "the header"
        self._handle = handle

    def load(self, end: int) -> None:
        """Have the bytes up to `end` in `data`.

        Raises:
            CheckpointError: the file has fewer, or no header is so long.
        """
        have = len(self.data)
        if end <= have:
            return
        if end > self.size:
            raise CheckpointError(
                f"{self.file} is truncated or damaged: {self.subject} goes on to byte {end:,}, and the file has "
                f"{self.size:,} bytes. Download it again."
            )
        if end > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.file}: {self.subject} goes on to byte {end:,}, and a header of at most "
                f"{MAX_HEADER_BYTES:,} bytes is allowed. Download it again, and from a source that you trust."
            )
        most = min(max(end, 2 * have, _FIRST_BYTES), self.size, MAX_HEADER_BYTES)
        self.data += self._handle.read(most - have)
        if len(self.data) < end:
            raise CheckpointError(f"{self.file} became shorter while it was read. Run it again when it is complete.")

    def take(self, form: struct.Struct) -> tuple[Any, ...]:
        """Read the values of a form."""
        begin = self.position
        self.skip(form.size)
        return form.unpack_from(self.data, begin)

    def skip(self, num_bytes: int) -> None:
        """Go over bytes, which must be there."""
        self.load(self.position + num_bytes)
        self.position += num_bytes

    def text(self, most: int) -> str:
        """Read a text of at most `most` bytes: a key or a name."""
        (length,) = self.take(_LENGTH)
        begin = self.position
        if length > most:
            raise self.fault(f"has a name of {length:,} bytes, at most {most:,} are allowed")
        self.skip(length)
        try:
            return self.data[begin : begin + length].decode()
        except UnicodeDecodeError:
            raise self.fault("has a name that is not UTF-8") from None

    def skip_texts(self, count: int) -> int:
        """Go over an array of texts.

        Returns:
            How many bytes the texts have in all.
        """
        self.load(self.position + 8 * count)  # each has at least its length: a count that cannot be ends here
        begin = position = self.position
        data, have, unpack = self.data, len(self.data), _LENGTH.unpack_from
        for _ in range(count):
            if position + 8 > have:
                self.load(position + 8)
                have = len(data)
            position += 8 + unpack(data, position)[0]
        self.load(position)
        self.position = position
        return position - begin - 8 * count

    def fault(self, why: str) -> CheckpointError:
        """Return the error that says why the present subject cannot be."""
        return CheckpointError(
            f"{self.file}: {self.subject} {why}. The header is damaged: download it again, and from a source that "
            "you trust."
        )
