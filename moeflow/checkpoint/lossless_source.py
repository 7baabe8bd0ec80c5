"""Layer sources whose records hold the same bfloat16 experts in 12 bits a value and a little, every bit kept.

`load_moe(quantization="lossless")` encodes at every read, `moeflow pack` once.

Knows records and the lossless format. Knows nothing of models.
"""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from moeflow.checkpoint.escape_scan import scan_escapes
from moeflow.checkpoint.layer_source import Conversion, LayerSource
from moeflow.checkpoint.reading.file_stamp import FileStamp
from moeflow.core import LayerLayout, MatrixSpec, RecordLayout
from moeflow.dtypes import tensors_of
from moeflow.errors import CheckpointError, ConfigError, ExpertReadError
from moeflow.kernels.cpu import lossless
from moeflow.kernels.quantization.formats import (
    LOSSLESS,
    MOST_LOSSLESS_VALUES,
    find_format,
    is_lossless,
    lossless_format,
)
from moeflow.progress import ProgressCallback

WORTH_IT = 0.9  # a record that is not smaller than this part of bfloat16's stays bfloat16
LEAVE_OUT = "Leave lossless out: nothing is lost without it, either."
_LEAST_ROOM = 16  # for escapes
_log = logging.getLogger(__name__)


def lossless_sources(
    files: list[Path],
    stamps: list[FileStamp],
    sources: list[LayerSource],
    transposed: list[bool],
    *,
    verify: bool = False,
    progress: ProgressCallback | None = None,
) -> tuple[list[LayerSource], str]:
    """Return sources whose records hold the same experts without loss in fewer bytes, where that saves a tenth.

    Sources that are lossless already, or cannot be, come back as they are.

    Args:
        files: that the piece tables number.
        stamps: of the files when their headers were read.
        sources: [num_layers].
        transposed: [num_layers], whether the module stores its matrices [in, out].
        verify: decode each record after it is encoded, and compare.
        progress: of the scan, called with (bytes looked at, bytes in all).

    Returns:
        The sources; and a sentence on why no expert is stored so (other dtypes, [in, out], quantised, exponents that
        differ too much), empty where some are.

    Raises:
        CheckpointError: a file changed.
        ExpertReadError: the disk failed.
    """
    if any_lossless(sources):
        return sources, ""
    names = [matrices_of(source.layout, turned) for source, turned in zip(sources, transposed, strict=True)]
    if not any(names):
        return sources, _why_none(sources, transposed)
    escapes = scan_escapes(files, stamps, sources, names, progress=progress)
    layouts = [
        lossless_layout(source.layout, of_layer, counts)
        for source, of_layer, counts in zip(sources, names, escapes, strict=True)
    ]
    if all(new is source.layout for new, source in zip(layouts, sources, strict=True)):
        return sources, (
            "the exponents of these experts differ too much to be stored in 4 bits: no record would take less than "
            f"{WORTH_IT:.0%} of its bfloat16 bytes."
        )
    _tell(layouts)
    return [
        source if new is source.layout else _encoded(source, new, verify)
        for new, source in zip(layouts, sources, strict=True)
    ], ""


def matrices_of(layout: LayerLayout, is_transposed: bool) -> list[str]:
    """Return the names of the matrices of a layer that can be stored without loss."""
    if is_transposed or layout.variants or layout.record.matrices:
        return []
    return [
        spec.name
        for spec in layout.record.tensors
        if len(spec.shape) == 2 and spec.dtype == "BF16" and 0 < spec.num_bytes // 2 <= MOST_LOSSLESS_VALUES
    ]


def lossless_layout(layout: LayerLayout, names: list[str], escapes: list[list[int]]) -> LayerLayout:
    """Lay a layer's experts out without loss: all that are worth it with the same room for escapes.

    Args:
        layout: in bfloat16.
        names: [matrices], those that are stored without loss.
        escapes: [num_experts][matrices], how many each needs.

    Returns:
        The layout; `layout` itself where no expert is worth it.
    """
    worth = [names != [] and _saves(_record(layout.record, names, counts), layout.record) for counts in escapes]
    if not any(worth):
        return layout
    most = [max(column) for column in zip(*(c for c, w in zip(escapes, worth, strict=True) if w), strict=True)]
    record = _record(layout.record, names, most)
    if not _saves(record, layout.record):
        return layout
    if all(worth):
        return LayerLayout(layout.name, layout.num_experts, record)
    kinds = tuple(0 if is_worth else 1 for is_worth in worth)
    return LayerLayout(layout.name, layout.num_experts, layout.record, (record, layout.record), kinds)


def with_checks(sources: list[LayerSource]) -> list[LayerSource]:
    """Return sources of a packed file that look at each lossless record when it is first read."""
    return [source._replace(check=_Check(source.layout)) if any_lossless([source]) else source for source in sources]


class _Check:
    """Looks at the lossless matrices of a record.

    Args:
        layout: of the layer.
    """

    def __init__(self, layout: LayerLayout) -> None:
        self._layout = layout

    def __call__(self, expert: int, record: np.ndarray) -> None:
        """Look at an expert's record, uint8 [>= num_bytes].

        Raises:
            CheckpointError: it does not hold what its format asks for.
        """
        layout = self._layout.record_of(expert)
        tensors = tensors_of(torch.from_numpy(record), layout)
        for matrix in layout.matrices:
            if matrix.format.startswith(LOSSLESS):
                lossless.decode(*parts_of(tensors, matrix), matrix.shape, None)


def _encoded(source: LayerSource, layout: LayerLayout, verify: bool) -> LayerSource:
    """Return a source that encodes each record of another."""

    def convert(expert: int, pieces: list[np.ndarray], record: np.ndarray) -> None:
        target = layout.record_of(expert)
        if not target.matrices:
            source.fill(expert, pieces, record)
            return
        raw, who = source.checked_record(expert, pieces), f"expert {expert} of {layout.name}"
        out, matrices = tensors_of(torch.from_numpy(record), target), {spec.name: spec for spec in target.matrices}
        for name, value in tensors_of(torch.from_numpy(raw), source.layout.record).items():
            if name not in matrices:
                out[name].copy_(value)
                continue
            parts = parts_of(out, matrices[name])
            try:
                lossless.encode(value, *parts)
            except ConfigError as error:  # no room: other values than those of the scan
                raise ExpertReadError(
                    f"{who}: {name} has other exponents than when the checkpoint was looked through ({error}). The "
                    "file is damaged: fetch it again."
                ) from error
            if verify:
                check_same(value, parts, f"{who}: {name}")

    return LayerSource(layout, (), (Conversion(tuple(source.pieces()), convert),))


def check_same(value: torch.Tensor, parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor], name: str) -> None:
    """Decode a matrix and compare it with its source.

    Args:
        value: [N, K], bfloat16.
        parts: its codes, tops and escapes.
        name: of the matrix, for errors.

    Raises:
        CheckpointError: a bit differs, or the parts are damaged.
    """
    codes, tops, escapes = parts
    again = torch.empty_like(value)
    lossless.decode(codes, tops, escapes, (value.shape[0], value.shape[1]), again)
    if not torch.equal(again.view(torch.int16), value.view(torch.int16)):
        raise CheckpointError(
            f"{name} would not come back as it is from the lossless format: nothing of it was written. The memory of "
            "this machine may be faulty: run it again, and report it to moeflow where it comes again."
        )


def _record(record: RecordLayout, names: list[str], escapes: list[int]) -> RecordLayout:
    """Lay out an expert with room for so many escapes of each named matrix; the rest stays as it is.

    The room is a power of two: layers have few kinds of records then, and a GPU compiles few kernels.
    """
    room = {
        name: max(_LEAST_ROOM, 1 << (count - 1).bit_length()) if count else 0
        for name, count in zip(names, escapes, strict=True)
    }
    tensors, matrices = [], []
    for tensor in record.tensors:
        if tensor.name not in room:
            tensors.append((tensor.name, tensor.dtype, tensor.shape))
            continue
        spec, shape = lossless_format(room[tensor.name]), (tensor.shape[0], tensor.shape[1])
        matrices.append(MatrixSpec(tensor.name, spec.name, shape))
        tensors += spec.tensors(tensor.name, shape)
    return RecordLayout.pack(tensors, tuple(matrices))


def _saves(record: RecordLayout, floats: RecordLayout) -> bool:
    return record.num_bytes < WORTH_IT * floats.num_bytes


def parts_of(tensors: dict[str, torch.Tensor], matrix: MatrixSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the codes, tops and escapes of a lossless matrix, of the tensors of its record."""
    codes, tops, escapes = (tensors[n] for n, _, _ in find_format(matrix.format).tensors(matrix.name, matrix.shape))
    return codes, tops, escapes


def any_lossless(sources: list[LayerSource]) -> bool:
    """Whether an expert of some layers is lossless."""
    return any(is_lossless(record) for source in sources for record in source.layout.records)


def _tell(layouts: list[LayerLayout]) -> None:
    """Log the experts that stay as they are, if there are any."""
    kept = Counter(
        layout.name for layout in layouts for e in range(layout.num_experts) if not is_lossless(layout.record_of(e))
    )
    if kept:
        _log.warning("%d experts stay bfloat16, since lossless saves too little: %s", kept.total(), ", ".join(kept))


def _why_none(sources: list[LayerSource], transposed: list[bool]) -> str:
    """Say why no layer of a model can be stored without loss."""
    layout = sources[0].layout
    if layout.record.matrices:
        form = layout.record.matrices[0].format
        return f"{layout.name} is stored in {form} already, and lossless is for bfloat16."
    if all(transposed):
        return f"{layout.name} stores its matrices [in, out], and lossless is for matrices [out, in]."
    dtypes = sorted({spec.dtype for source in sources for spec in source.layout.record.tensors})
    return f"these experts are {', '.join(dtypes)}, and lossless is for bfloat16 (BF16)."
