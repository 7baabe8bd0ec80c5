"""Packs a checkpoint: the same weights, each expert as one aligned, checksummed record.

Knows packed folders. Knows nothing of budgets.
"""

from pathlib import Path

from moeflow.checkpoint.lossless_source import lossless_sources
from moeflow.checkpoint.packed_writer import check_output, write_packed
from moeflow.hf import experts_interface
from moeflow.hf.model_folder import ModelFolder
from moeflow.progress import ProgressCallback


def pack_model(
    model: str | Path, out: str | Path, *, lossless: bool = False, progress: ProgressCallback | None = None
) -> Path:
    """Write `model` as a folder that load_moe reads faster: one aligned read an expert, no conversion.

    Args:
        model: a hub id or a checkpoint folder.
        out: the folder to write; must not exist. A killed run is continued by the next with the same arguments.
        lossless: store bfloat16 experts in 12 bits a value and a little, every bit kept. Each record is decoded and
            compared with its source before it counts as written.
        progress: called with (bytes written, bytes in all); first with those of the scan where lossless.

    Returns:
        The folder.

    Raises:
        ConfigError: `out` exists, its disk is too small, or no expert can be stored in fewer bytes without loss.
        CheckpointError: a record would not come back as it is.
        MoeflowError: the disk became full or failed; `out` is not there, `OUT.partial` continues on the next run.
    """
    folder, out = ModelFolder(model), Path(out)
    check_output(folder.path, out)
    empty = folder.empty_model()
    layers, settings = folder.layers(empty), ""
    if lossless:
        transposed, files = experts_interface.transposed(empty), folder.expert_files
        layers = lossless_sources(files, folder.expert_stamps, layers, transposed, verify=True, progress=progress)
        settings = "lossless"
    return write_packed(folder.checkpoint, layers, folder.feeding(empty), out, settings=settings, progress=progress)
