"""Packs a checkpoint: the same weights, each expert as one aligned, checksummed record, without loss in fewer bytes.

Knows packed folders. Knows nothing of budgets.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from moeflow.checkpoint.float_source import float_sources
from moeflow.checkpoint.layer_source import LayerSource
from moeflow.checkpoint.lossless_source import LEAVE_OUT, lossless_sources
from moeflow.checkpoint.packed_writer import check_output, write_packed
from moeflow.errors import ConfigError
from moeflow.hf import experts_interface
from moeflow.hf.model_folder import ModelFolder
from moeflow.kernels.quantization.formats import is_lossless
from moeflow.progress import ProgressCallback

_log = logging.getLogger(__name__)


class Packed(NamedTuple):
    """A folder that was written.

    Args:
        folder: the folder.
        num_experts: routed experts in all layers.
        num_lossless: how many of them are stored without loss in fewer bytes; the others as they are.
        why_floats: a sentence on why none is; empty where some are.
        weight_bytes: of the files of weights that were written.
        source_bytes: of the source's files of weights.
    """

    folder: Path
    num_experts: int
    num_lossless: int
    why_floats: str
    weight_bytes: int
    source_bytes: int


def pack_model(
    model: str | Path, out: str | Path, *, lossless: bool | None = None, progress: ProgressCallback | None = None
) -> Packed:
    """Write `model` as a folder that load_moe reads faster: one aligned read an expert, no conversion.

    Args:
        model: a hub id or a checkpoint folder, packed ones too.
        out: the folder to write; must not exist. A killed run is continued by the next with the same arguments.
        lossless: whether bfloat16 experts are stored in 12 bits a value and a little, every bit kept. None: where that
            saves a tenth, and all others as they are. True: an error where nothing is saved. False: none; those of a
            packed folder that has them so become bfloat16 again. Each record is decoded and compared with its source
            before it counts as written.
        progress: called with (bytes written, bytes in all); first with those of the scan of exponents.

    Raises:
        ConfigError: `out` exists, its disk is too small, `model` is packed as it would be written, or `lossless` is
            True and no expert can be stored so in fewer bytes.
        CheckpointError: a record would not come back as it is.
        MoeflowError: the disk became full or failed; `out` is not there, `OUT.partial` continues on the next run.
    """
    folder, out = ModelFolder(model), Path(out)
    check_output(out)
    empty = folder.empty_model()
    found = folder.layers(empty)
    if folder.gguf is not None and not folder.packed:
        exact = folder.layers(folder.empty_model(torch.float32))  # with biases as the file has them
        found = exact if all(source.layout.record.matrices for source in exact) else found
    if lossless is False:
        layers, why_floats = float_sources(found), "lossless is off."
    else:
        transposed, files = experts_interface.transposed(empty), folder.expert_files
        layers, why_floats = lossless_sources(
            files, folder.expert_stamps, found, transposed, verify=True, progress=progress
        )
        if lossless and why_floats:
            raise ConfigError(f"{why_floats} {LEAVE_OUT}")
    if folder.packed and all(new is old for new, old in zip(layers, found, strict=True)):
        raise _packed_already(folder.path, why_floats)
    counts = [_count_lossless(source) for source in layers]
    num_experts = sum(source.layout.num_experts for source in layers)
    _log.info("%d of %d experts are stored without loss in fewer bytes. %s", sum(counts), num_experts, why_floats)
    write_packed(
        folder.checkpoint,
        layers,
        folder.feeding(empty),
        out,
        packed=folder.packed_file,
        settings="" if why_floats else "lossless",
        architecture=folder.gguf_architecture,
        progress=progress,
    )
    sizes = (_weight_bytes(ModelFolder(out)), _weight_bytes(folder))
    return Packed(out, num_experts, sum(counts), why_floats, *sizes)


def _count_lossless(source: LayerSource) -> int:
    return sum(is_lossless(source.layout.record_of(expert)) for expert in range(source.layout.num_experts))


def _weight_bytes(folder: ModelFolder) -> int:
    return sum(file.stat().st_size for file in {*folder.checkpoint.files, *folder.expert_files})


def _packed_already(path: Path, why_floats: str) -> ConfigError:
    if why_floats:
        why = why_floats.rstrip(".")
        return ConfigError(f"{path} is packed already, with its experts as they are ({why}): copy the folder.")
    return ConfigError(
        f"{path} is packed already, its experts without loss. Copy the folder, or give lossless=False (--no-lossless) "
        "to have them in bfloat16 again."
    )
