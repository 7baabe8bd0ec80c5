"""Description of a model from its headers and a few experts: its sizes, and the slots that each budget buys.

Knows a model on disk. Knows nothing of loading it.
"""

from pathlib import Path

from moeflow import hardware
from moeflow.core import RecordLayout
from moeflow.hf import experts_interface
from moeflow.hf.model_folder import ModelFolder
from moeflow.kernels.quantization.formats import is_lossless
from moeflow.loading.budget import ExpertsSize
from moeflow.loading.lossless_saving import lossless_saving
from moeflow.machine.gpus import gpu_names

_BUDGET_SHARES_PERCENT = (12.5, 25, 50, 75, 100)


def describe_model(model: str | Path) -> dict:
    """Describe a model from its headers, and from the exponents of four of its experts at most.

    Args:
        model: a hub id or a folder.

    Returns:
        Names and sizes: model_type, layers, moe_layers, experts, num_experts_per_tok, expert_bytes, experts_bytes,
        dense_bytes, gguf (of a GGUF file: "architecture", "files", and "types", the bytes of each of GGML's types among
        "experts" and "dense"; else None), links_out (files that are links out of the folder, and where to),
        minimum_bytes, budgets (share, slots, bytes, experts resident a layer), lossless (what `LosslessSaving` has, or
        None), machine.

    Raises:
        ModelSourceError, CheckpointError, ExpertReadError, UnsupportedModelError: as load_moe does.
    """
    folder = ModelFolder(model)
    empty = folder.empty_model()
    layers, feeding = folder.layers(empty), folder.feeding(empty)
    size = ExpertsSize.of([source.layout for source in layers], experts_interface.num_experts_per_tok(empty))
    dense = sum(entry.num_bytes for name, entry in folder.checkpoint.tensors.items() if name not in feeding)
    counts = sorted({source.layout.num_experts for source in layers})
    records = {record for source in layers for record in source.layout.records}
    record_bytes = sorted({record.num_bytes for record in records})
    formats = sorted({name for record in records for name in _formats(record)})
    transposed, files = experts_interface.transposed(empty), folder.expert_files
    saving = lossless_saving(files, folder.expert_stamps, layers, transposed)
    text = folder.config.get_text_config(decoder=True)
    return {
        "model": str(model),
        "model_type": folder.config.model_type,
        "packed": folder.packed,
        "layers": getattr(text, "num_hidden_layers", None),
        "moe_layers": len(layers),
        "experts_per_layer": counts[0] if len(counts) == 1 else counts,
        "num_experts_per_tok": size.num_experts_per_tok,
        "num_experts": size.num_experts,
        "dtype": ", ".join(formats),
        "expert_bytes": record_bytes[0] if len(record_bytes) == 1 else record_bytes,
        "experts_bytes": size.all_bytes,
        "dense_bytes": dense,
        "gguf": _gguf(folder, feeding),
        "lossless": None if saving is None else saving._asdict(),
        "links_out": folder.links_out(),
        "minimum_bytes": size.min_bytes,
        "budgets": [_budget(size, len(layers), share) for share in _BUDGET_SHARES_PERCENT],
        "machine": {
            "memory_available_bytes": hardware.available_memory_bytes(),
            "memory_limit_bytes": hardware.memory_limit_bytes(),
            "gpus": gpu_names(),
        },
    }


def _gguf(folder: ModelFolder, feeding: set[str]) -> dict | None:
    """Return what a GGUF file stores its tensors in; of a packed folder only dense ones lie in it."""
    if folder.gguf is None:
        return None
    types: dict[str, dict[str, int]] = {"experts": {}, "dense": {}}
    for name, entry in folder.gguf.tensors.items():
        held, kind = types["experts" if name in feeding else "dense"], entry.dtype.lower()
        held[kind] = held.get(kind, 0) + entry.num_bytes
    return {
        "architecture": folder.gguf.metadata["general.architecture"],
        "files": len(folder.gguf.files),
        "types": {name: dict(sorted(held.items(), key=lambda item: -item[1])) for name, held in types.items() if held},
    }


def _formats(record: RecordLayout) -> set[str]:
    """Return what a record's matrices are stored in; lossless is one format, whatever its room for escapes."""
    if is_lossless(record):
        return {spec.format.rpartition("-")[0] for spec in record.matrices}  # without the room for escapes
    return {spec.format for spec in record.matrices} or {record.tensors[0].dtype}


def _budget(size: ExpertsSize, num_layers: int, share: float) -> dict:
    num_bytes = int(size.all_bytes * share / 100)
    slots = size.num_experts * num_bytes // size.all_bytes  # on average, where experts differ in size
    return {
        "share_percent": share,
        "bytes": num_bytes,
        "slots": slots,
        "resident_experts_per_layer": round(slots / num_layers, 2),
        "runs": num_bytes >= size.min_bytes,
    }
