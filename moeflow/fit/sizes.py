"""Sizes of a model's parts by the names and shapes in its headers: dense weights, and experts in each format.

No model is built, so that 671B parameters take a fraction of a second. Knows names of tensors. Knows nothing of memory
or speed.
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moeflow.checkpoint.headers import Checkpoint, TensorEntry, open_checkpoint
from moeflow.checkpoint.packed_file import PACKED_FILE, packed_layers
from moeflow.core import DTYPE_BYTES, PAGE_BYTES, TENSOR_ALIGNMENT_BYTES, LayerLayout, align_up
from moeflow.errors import UnsupportedModelError
from moeflow.fit.config_facts import Attention, ConfigFacts, read_config
from moeflow.fit.formats import KERNELS, LOSSLESS_SHARE, StoredAs, kernel_of, mean_bits, most_of, published_as
from moeflow.kernels.quantization.formats import LOSSLESS
from moeflow.kernels.quantization.ggml import BLOCK_TYPES

_PER_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")
_STACKED = re.compile(r"(.*\.experts)\.([^0-9].*)|(.*)\.((?:input|output)_linear\.weight)")
_GGUF_PER_EXPERT = re.compile(r"(blk\.\d+)\.ffn_\w+\.(\d+)\.weight")
_GGUF_STACKED = re.compile(r"(blk\.\d+)\.ffn_\w+_exps\.\w+")
_LAYER = re.compile(r"(.*?\b(?:layers|blk)\.)(\d+)\.")
_EMBEDDING = re.compile(r"(embed_tokens|word_embeddings|wte|embedding|token_embd)\.weight$")
_HEAD = re.compile(r".*lm_head\.weight|output\.weight")
_BLOCKS = {name for name, kind in BLOCK_TYPES.items() if kind.block_values > 1}
WINDOW_MARGIN = 32  # positions that the engine keeps before a window
_FLOATS = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class LayerExperts:
    """The routed experts of one layer.

    Args:
        num_experts: how many.
        shapes: of the tensors of one expert, without the expert dimension.
        stored_bytes: of one expert on disk, as published; the mean where they differ.
        memory_bytes: of one expert's slot as published: its record in whole pages; the mean where they differ.
        most_bytes: of the largest slot.
        pieces: reads that an expert as published takes.
    """

    num_experts: int
    shapes: tuple[tuple[int, ...], ...]
    stored_bytes: float
    memory_bytes: float
    most_bytes: int
    pieces: int

    def num_weights(self) -> int:
        """Return the values of one expert's matrices."""
        return sum(math.prod(shape) for shape in self.shapes if len(shape) > 1)


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of a model's parts.

    Args:
        config: what its config says.
        layers: [num_moe_layers].
        dense_bytes: of the weights that stay in memory, in the model's dtype.
        dense_matrix_bytes: of those, what every token reads: the matrices but the embedding, the head among them.
        dense_file_bytes: on disk.
        dtype: safetensors name of the model's dtype.
        published: what experts are stored in.
        num_shards: files of the checkpoint.
        dense_matrix_values: of the matrices that every token reads; 0 where they are all in the model's dtype.
    """

    config: ConfigFacts
    layers: tuple[LayerExperts, ...]
    dense_bytes: int
    dense_matrix_bytes: int
    dense_file_bytes: int
    dtype: str
    published: StoredAs
    num_shards: int
    dense_matrix_values: int = 0

    @cached_property
    def num_experts(self) -> int:
        """Routed experts in all layers."""
        return sum(layer.num_experts for layer in self.layers)

    @property
    def top_k(self) -> int:
        """Experts that a token takes in one layer."""
        return min(self.config.num_experts_per_tok, max(layer.num_experts for layer in self.layers))

    def slot_bytes(self, form: StoredAs) -> int:
        """Return the bytes of the largest expert's slot in a format."""
        if form.is_published:
            return max(layer.most_bytes for layer in self.layers)
        return max(form.slot_bytes(layer.shapes) for layer in self.layers)

    def experts_bytes(self, form: StoredAs) -> int:
        """Return the bytes of all experts' slots in a format."""
        if form.is_published:
            return round(sum(layer.num_experts * layer.memory_bytes for layer in self.layers))
        return sum(layer.num_experts * form.slot_bytes(layer.shapes) for layer in self.layers)

    def file_bytes(self, form: StoredAs) -> int:
        """Return the bytes on disk: dense weights, and experts in a format."""
        if form.is_published:
            return self.dense_file_bytes + round(sum(layer.num_experts * layer.stored_bytes for layer in self.layers))
        return self.dense_file_bytes + self.experts_bytes(form)

    def dense_in_memory(self, form: StoredAs) -> int:
        """Return the bytes of dense weights; beside lossless experts their bfloat16 matrices are kept as codes too."""
        if form.kernel == LOSSLESS and self.dtype == "BF16":
            return self.dense_bytes - round((1 - LOSSLESS_SHARE) * self.dense_matrix_bytes)
        return self.dense_bytes

    def dense_read_bytes(self, form: StoredAs) -> int:
        """Return the bytes of dense matrices that every decode step reads."""
        return self.dense_matrix_bytes - self.dense_bytes + self.dense_in_memory(form)

    def key_value_bytes(self, context: int, most_new: int | None = None) -> int:
        """Return the bytes of one sequence's keys and values.

        Args:
            context: positions.
            most_new: most tokens of it in one pass: where that is less than the context, a layer with a window keeps
                what the window and one pass see. None for a prompt in one pass, which needs all of it.
        """
        return DTYPE_BYTES[self.dtype] * kept_values(self.config.attention, context, most_new or context)


def kept_values(attention: Attention, context: int, most_new: int) -> int:
    """Return how many numbers all layers keep of this many positions; arguments as of `key_value_bytes`."""
    return sum(
        values * (min(context, window - 1 + WINDOW_MARGIN + most_new) if window else context)
        for values, window in zip(attention.values, attention.windows, strict=True)
    )


def sizes_of(folder: Path, checkpoint: Checkpoint | None = None) -> ModelSizes:
    """Read a model's sizes.

    Args:
        folder: holds config.json, and the weights where no checkpoint is given.
        checkpoint: headers that were read elsewhere, as over HTTP.

    Raises:
        CheckpointError, ConfigError, ModelSourceError: the folder, its config or its headers are not as they must be.
        UnsupportedModelError: no routed experts.
    """
    folder = Path(folder)
    config = read_config(folder) if folder.is_dir() or checkpoint else None
    checkpoint = open_checkpoint(folder) if checkpoint is None else checkpoint
    config = read_config(folder) if config is None else config
    dtype = config.dtype or (checkpoint.dtype if checkpoint.dtype in _FLOATS else None) or "F32"
    found, dense = _split(checkpoint.tensors, config)
    packed = (folder / PACKED_FILE).is_file()
    layouts = [source.layout for source in packed_layers(folder)] if packed else []
    layers = _packed_layers(layouts) if packed else [_layer(name, parts, dtype) for name, parts in found.items()]
    if not layers:
        raise UnsupportedModelError(
            f"no tensor of {folder} is of routed experts: it is a dense model, or one that moeflow does not know by "
            "its names. Only mixture-of-experts models are planned."
        )
    sizes = {name: _in_memory(entry, dtype) for name, entry in dense.items()}
    tied = not any(_HEAD.fullmatch(name) for name in dense)
    read = [name for name in dense if len(dense[name].shape) > 1 and (tied or not _EMBEDDING.search(name))]
    published = (
        published_as(kernel_of(layouts), bits=mean_bits(layouts)) if packed else _published(found, config, dtype)
    )
    return ModelSizes(
        config=config,
        layers=tuple(layers),
        dense_bytes=sum(sizes.values()),
        dense_matrix_bytes=sum(sizes[name] for name in read),
        dense_file_bytes=sum(entry.num_bytes for entry in dense.values()),
        dtype=dtype,
        published=published,
        num_shards=len(checkpoint.files),
        dense_matrix_values=sum(math.prod(dense[name].shape) for name in read) if "token_embd.weight" in dense else 0,
    )


Parts = dict[str, dict[int, list[TensorEntry]]]  # layer -> expert (-1: stacked, of all) -> tensors


def _split(tensors: dict[str, TensorEntry], config: ConfigFacts) -> tuple[Parts, dict[str, TensorEntry]]:
    """Divide a checkpoint's tensors into those of routed experts and all others that are loaded."""
    found: Parts = {}
    dense: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        place = _place(name, entry, config)
        if place is None:
            dense[name] = entry
        else:
            partner = name.replace("ffn_gate", "ffn_up") if "ffn_gate" in name else name.replace("ffn_up", "ffn_gate")
            other = tensors.get(partner)
            if name.startswith("blk.") and other is not None and other.dtype != entry.dtype:
                entry = entry._replace(dtype="F32")  # gate and up of two types become floats as they are read
            found.setdefault(place[0], {}).setdefault(place[1], []).append(entry)
    # Layers beyond the decoder's, as for predicting several tokens at once, are never loaded.
    stems = {match[1] for layer in found if (match := _LAYER.match(f"{layer}."))}

    def is_loaded(name: str) -> bool:
        match = _LAYER.match(f"{name}.")
        return match is None or match[1] not in stems or int(match[2]) < config.num_layers

    return (
        {layer: parts for layer, parts in found.items() if is_loaded(layer)},
        {name: entry for name, entry in dense.items() if is_loaded(name)},
    )


def _place(name: str, entry: TensorEntry, config: ConfigFacts) -> tuple[str, int] | None:
    """Return the layer of an expert's tensor and the expert's number, -1 for one of all experts."""
    match = _PER_EXPERT.fullmatch(name) or _GGUF_PER_EXPERT.fullmatch(name)
    if match is not None:
        return match[1], int(match[2])
    match = _GGUF_STACKED.fullmatch(name)
    if match is not None and len(entry.shape) > 1:
        return match[1], -1
    match = _STACKED.fullmatch(name)
    if match is None or not entry.shape or len(entry.shape) < 2:
        return None
    if match[1] is None:
        return (match[3], -1) if len(entry.shape) == 3 else None
    count = config.num_experts or entry.shape[0]
    return (match[1], -1) if entry.shape[0] % count == 0 else None


def _layer(name: str, experts: dict[int, list[TensorEntry]], dtype: str) -> LayerExperts:
    is_gguf = name.startswith("blk.")
    stacked = experts.get(-1)
    if stacked is not None:
        count = min(entry.shape[0] for entry in stacked)
        entries = [
            entry._replace(
                shape=entry.shape[1:] if entry.shape[0] == count else (entry.shape[0] // count, *entry.shape[1:]),
                num_bytes=entry.num_bytes // count,
            )
            for entry in stacked
        ]
    else:
        count, entries = len(experts), next(iter(experts.values()))
    slots = (
        [_slot_bytes(entries, dtype, is_gguf)]
        if stacked is not None
        else [_slot_bytes(one, dtype, is_gguf) for one in experts.values()]
    )
    return LayerExperts(
        num_experts=count,
        shapes=tuple(entry.shape for entry in entries),
        stored_bytes=sum(entry.num_bytes for entry in entries),
        memory_bytes=sum(slots) / len(slots),
        most_bytes=max(slots),
        pieces=len([entry for entry in entries if entry.num_bytes >= PAGE_BYTES]) or 1,
    )


def _slot_bytes(entries: list[TensorEntry], dtype: str, is_gguf: bool) -> int:
    """Return the bytes of an expert's slot: its tensors one behind the other, in whole pages.

    Those of a GGUF file stay in their types, whether blocks or floats.
    """
    is_coded = _is_coded(entries)
    return align_up(
        sum(
            align_up(
                _as_read(entry) if is_gguf else entry.num_bytes if is_coded else _in_memory(entry, dtype),
                TENSOR_ALIGNMENT_BYTES,
            )
            for entry in entries
        ),
        PAGE_BYTES,
    )


def _packed_layers(layouts: list[LayerLayout]) -> list[LayerExperts]:
    layers = []
    for layout in layouts:
        records = [layout.record_of(expert) for expert in range(layout.num_experts)]
        slots = [align_up(record.num_bytes, PAGE_BYTES) for record in records]
        mean = sum(slots) / len(slots)
        record = layout.record
        shapes: list[tuple[int, ...]] = [one.shape for one in record.matrices or record.tensors]
        layers.append(LayerExperts(layout.num_experts, tuple(shapes), mean, mean, max(slots), 1))
    return layers


def _is_coded(entries: list[TensorEntry]) -> bool:
    return any(entry.dtype not in _FLOATS for entry in entries)


def _in_memory(entry: TensorEntry, dtype: str) -> int:
    """Return the bytes of a tensor once it is loaded: floats in the model's dtype, others as they are."""
    if entry.dtype in _FLOATS or entry.dtype.startswith("F8"):
        is_kept = entry.dtype == dtype
        return entry.num_bytes if is_kept else math.prod(entry.shape) * DTYPE_BYTES[dtype]
    if entry.dtype in _BLOCKS and len(entry.shape) != 2:  # only matrices stay in blocks
        return math.prod(entry.shape) * DTYPE_BYTES[dtype]
    return entry.num_bytes


def _published(found: Parts, config: ConfigFacts, dtype: str) -> StoredAs:
    """Return what experts are stored in that lie in the checkpoint's own tensors."""
    if next(iter(found), "").startswith("blk."):
        return _published_blocks(found)
    coded = {entry.dtype for parts in found.values() for entry in next(iter(parts.values()))} - set(_FLOATS)
    if not coded and not config.is_quantized:
        return published_as(KERNELS[dtype])
    return published_as("fp8" if any(name.startswith("F8") for name in coded) else "mxfp4")


def _as_read(entry: TensorEntry) -> int:
    """Return the bytes of an expert's tensor of a GGUF file in a slot."""
    return DTYPE_BYTES["F32"] * math.prod(entry.shape) if entry.dtype == "F32" else entry.num_bytes


def _published_blocks(found: Parts) -> StoredAs:
    """Return what the experts of a GGUF file are stored in: its types, and the kernel of the one with most bytes."""
    held: dict[str, int] = {}
    for parts in found.values():
        for entry in (entry for entries in parts.values() for entry in entries if len(entry.shape) > 1):
            name = BLOCK_TYPES[entry.dtype].format
            held[name] = held.get(name, 0) + _as_read(entry)
    return published_as(most_of(held), label=", ".join(sorted(held, key=lambda name: -held[name])))
