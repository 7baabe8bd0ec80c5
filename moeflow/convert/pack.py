"""Packs a checkpoint: the same weights, each expert as one aligned, checksummed record.

Knows packed folders. Knows nothing of budgets.
"""

from pathlib import Path

from moeflow.checkpoint.packed_writer import check_output, write_packed
from moeflow.hf.model_folder import ModelFolder
from moeflow.progress import ProgressCallback


def pack_model(model: str | Path, out: str | Path, *, progress: ProgressCallback | None = None) -> Path:
    """Write `model` as a folder that load_moe reads faster: one aligned read an expert, no conversion.

    Args:
        model: a hub id or a checkpoint folder.
        out: the folder to write; must not exist.
        progress: called with (bytes written, bytes in all).

    Returns:
        The folder.

    Raises:
        ConfigError: `out` exists, or its disk is too small.
        MoeflowError: the disk became full or failed; `out` is not there, `OUT.partial` continues on the next run.
    """
    folder, out = ModelFolder(model), Path(out)
    check_output(folder.path, out)
    empty = folder.empty_model()
    return write_packed(folder.checkpoint, folder.layers(empty), folder.feeding(empty), out, progress=progress)
