"""Checks of the GGUF file that a folder stands for: its headers, and that all of its tensors have a place.

Knows files and tensors. Knows nothing of what a model does with them.
"""

from pathlib import Path

from moeflow.checkpoint.gguf.file import GGUF_FILE
from moeflow.doctor.finding import BROKEN, Finding
from moeflow.doctor.model.shards import Shards
from moeflow.errors import MoeflowError
from moeflow.formatting import format_bytes
from moeflow.hf.gguf.folder import open_gguf_of


def check_gguf(folder: Path, found: list[Finding]) -> Shards | None:
    """Read the headers of a GGUF file, and compare them with the sizes of its files.

    Args:
        folder: that stands for it.
        found: findings are added to it.

    Returns:
        What can be read; None where the folder stands for none.
    """
    if not (folder / GGUF_FILE).is_file():
        return None
    try:
        file = open_gguf_of(folder)
    except MoeflowError as error:
        found.append(Finding("GGUF", str(folder), BROKEN, str(error), "download the file again"))
        return Shards([], {})
    assert file is not None, "the folder has a gguf.json"
    shards = Shards(file.files, file.tensors)
    types: dict[str, int] = {}
    for entry in file.tensors.values():
        types[entry.dtype.lower()] = types.get(entry.dtype.lower(), 0) + entry.num_bytes
    kinds = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in sorted(types.items(), key=lambda one: -one[1]))
    names = ", ".join(path.name for path in file.files[:3]) + (" ..." if len(file.files) > 3 else "")
    found.append(Finding("GGUF", f"{names}: {len(file.tensors)} tensors of {kinds}: headers and sizes agree"))
    return shards
