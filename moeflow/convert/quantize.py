"""Writes a model with its experts in weight formats: one for all, or one for each.

Knows packed folders. Knows nothing of how formats are chosen.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from moeflow.checkpoint.float_source import value_sources
from moeflow.checkpoint.layer_source import LayerSource
from moeflow.checkpoint.packed_writer import check_output, write_packed
from moeflow.checkpoint.quantized_source import Calibration, quantize_sources, writable_format
from moeflow.checkpoint.writing.shards import Shards
from moeflow.errors import ConfigError
from moeflow.hf import experts_interface
from moeflow.hf.model_folder import ModelFolder
from moeflow.kernels.quantization.formats import find_format
from moeflow.progress import ProgressCallback

METHODS = ("hqq", "rtn", "gptq")


class Written(NamedTuple):
    """A folder that was written.

    Args:
        folder: the folder.
        expert_bytes: bytes of all experts' records.
        bits_per_weight: those bytes, scales and zeros included, over the experts' weights.
        formats: how many experts have each format.
    """

    folder: Path
    expert_bytes: int
    bits_per_weight: float
    formats: dict[str, int]


def quantize_model(
    model: str | Path,
    out: str | Path,
    formats: str | list[list[str]],
    *,
    method: str = "hqq",
    calibration: Calibration | None = None,
    requantize: bool = False,
    progress: ProgressCallback | None = None,
) -> Written:
    """Write `model` as a packed folder whose experts are quantised; load_moe(out) reads it. Lossy.

    Args:
        model: a hub id or a checkpoint folder with float experts, packed ones too.
        out: the folder to write; must not exist. A killed run is continued by the next with the same arguments.
        formats: a format's name, or one for every expert, [num_layers][num_experts].
        method: "hqq" (zeros optimised, no data), "rtn" (round to nearest), or "gptq" (needs calibration).
        calibration: inputs of experts, for "gptq": see `moeflow.calibration.expert_inputs`.
        requantize: whether experts in the blocks of a GGUF file may be quantised: their values are rounded a second
            time.
        progress: called with (bytes written, bytes in all).

    Raises:
        ConfigError: `out` exists, an unknown format or method, experts that are quantised already, or a disk too small.
        CheckpointError: weights that are no numbers; names the expert.
        MoeflowError: the disk failed; `OUT.partial` continues on the next run.
    """
    check_method(method, calibration)
    folder, out = ModelFolder(model), Path(out)
    check_output(out)
    return quantize_folder(
        folder, out, formats, method=method, calibration=calibration, requantize=requantize, progress=progress
    )


def check_method(method: str, calibration: Calibration | None = None) -> None:
    """Refuse a method that is unknown, or lacks what it learns from.

    Raises:
        ConfigError: it is.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is unknown. Allowed: {', '.join(METHODS)}.")
    if method == "gptq" and calibration is None:
        raise ConfigError('method="gptq" learns from what experts see: give a calibration, or use "hqq".')


def quantize_folder(
    folder: ModelFolder,
    out: Path,
    formats: str | list[list[str]],
    *,
    method: str,
    calibration: Calibration | None = None,
    requantize: bool = False,
    shards: Shards | None = None,
    progress: ProgressCallback | None = None,
) -> Written:
    """Write an opened model as `quantize_model` does, which see.

    Args:
        folder: the model.
        out: see `quantize_model`, as for all the others.
        formats: one for all experts, or one for each.
        method: how codes are chosen.
        calibration: for "gptq".
        requantize: whether rounded experts may be rounded again.
        shards: brings the model's shards; None where they are on this disk.
        progress: called with (bytes written, bytes in all).
    """
    empty = folder.empty_model()
    sources, transposed = folder.layers(empty), experts_interface.transposed(empty)
    if folder.gguf is not None:
        _check_blocks(folder, sources, requantize)
        sources = value_sources(sources, transposed)
    if isinstance(formats, str):
        formats = [[writable_format(formats).name] * source.layout.num_experts for source in sources]
    layers = quantize_sources(sources, formats, transposed, method=method, calibration=calibration)
    settings = method if calibration is None else f"{method} {calibration.fingerprint}"
    write_packed(
        folder.checkpoint,
        layers,
        folder.feeding(empty),
        out,
        packed=folder.packed_file,
        shards=shards,
        settings=settings,
        architecture=folder.gguf_architecture,
        progress=progress,
    )
    num_bytes, num_weights = _size(layers)
    counts = Counter(name for names in formats for name in names)
    return Written(out, num_bytes, 8 * num_bytes / num_weights, dict(counts))


def _check_blocks(folder: ModelFolder, sources: list[LayerSource], requantize: bool) -> None:
    """Refuse experts in a GGUF file's blocks unless they may be rounded again."""
    found = {matrix.format for source in sources for matrix in source.layout.record.matrices}
    blocks = sorted(name for name in found if find_format(name).kind == "ggml")
    if blocks and not requantize:
        raise ConfigError(
            f"the experts of {folder.name} are in {', '.join(blocks)} already: rounding them again loses more than "
            "quantising the model's float checkpoint, which is the better way. To do it nonetheless say --requantize "
            "(requantize=True)."
        )


def _size(layers: list[LayerSource]) -> tuple[int, int]:
    """Return the bytes of all records, and the number of weights in them."""
    records = [source.layout.record_of(e) for source in layers for e in range(source.layout.num_experts)]
    weights = sum(spec.shape[0] * spec.shape[1] for record in records for spec in record.matrices)
    return sum(record.num_bytes for record in records), weights
