"""Writes a model as one GGUF file, as llama.cpp and moeflow read it: tensor by tensor, each expert by itself.

Knows folders and GGUF's tensors. Knows nothing of budgets.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from moeflow.atomic_file import atomic_file, check_target
from moeflow.checkpoint.store import ExpertStore
from moeflow.convert.gguf_tokenizer import write_tokenizer
from moeflow.errors import ConfigError
from moeflow.formatting import format_bytes
from moeflow.hf import experts_interface, pretrained, quantizer
from moeflow.hf.eager.dense import EagerDenseWeights
from moeflow.hf.eager.stored_weights import StoredWeights
from moeflow.hf.eager.weights import EagerWeights
from moeflow.hf.gguf.architecture import Architecture, Rule
from moeflow.hf.gguf.architectures import architecture_of
from moeflow.hf.gguf.writing import rule_of, tensor_names
from moeflow.hf.model_folder import ModelFolder
from moeflow.progress import ProgressCallback

KINDS = {  # option -> the file's type
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
EXPERT_KINDS = KINDS | {"mxfp4": gguf.LlamaFileType.MOSTLY_MXFP4_MOE}
# Kept in float32, as llama.cpp's own converter does: routers, convolutions, everything of one dimension.
_IN_FLOAT32 = ("_norm", "ffn_gate_inp", "ffn_gate_inp_shexp", "ssm_conv1d", "shortconv.conv", "attn_sinks")
_CHUNK = 1 << 24  # values that are converted at a time


class Written(NamedTuple):
    """A file that was written.

    Args:
        file: the file.
        architecture: its name in GGUF.
        num_tensors: in the file.
        num_bytes: of the file.
    """

    file: Path
    architecture: str
    num_tensors: int
    num_bytes: int


class _Tensor(NamedTuple):
    """A tensor to write: its name, shape and type, and the parts that it is made of, one after another."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    parts: Callable[[], Iterator[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size


def write_gguf(
    model: str | Path,
    out: str | Path,
    kind: str = "f16",
    *,
    experts: str | None = None,
    pre: str | None = None,
    progress: ProgressCallback | None = None,
) -> Written:
    """Write a model as a GGUF file.

    Memory stays near the largest dense weight, or expert. What a file cannot say is refused by name.

    Args:
        model: a hub id or a folder; of quantised weights, the values that they stand for are written.
        out: the file; one that is there is replaced when the new one is whole.
        kind: of the matrices, of `KINDS`; norms, biases and routers are in float32 always.
        experts: of the routed experts' matrices, of `EXPERT_KINDS`; None: `kind`. mxfp4 loses nothing of gpt-oss.
        pre: llama.cpp's name of the way that the tokenizer cuts text; None to tell it from tokenizer.json.
        progress: called with (bytes written, bytes in all).

    Raises:
        ConfigError: an option is wrong, the disk is too small, or float16 cannot hold a value.
        UnsupportedModelError: an architecture, a tokenizer or a field of the config that a GGUF file cannot have.
        CheckpointError: the checkpoint is incomplete, or changed meanwhile.
        MoeflowError: the file cannot be written.
    """
    out = Path(out)
    kinds = {"matrices": kind, "experts": experts or kind}
    for value, known in ((kind, KINDS), (kinds["experts"], EXPERT_KINDS)):
        if value not in known:
            raise ConfigError(f"the type is {value!r}. Give one of {', '.join(known)}.")
    check_target(out, ConfigError)
    folder = ModelFolder(model)
    if folder.gguf is not None:
        raise ConfigError(f"{model} is a GGUF file already: moeflow writes one of a folder of safetensors alone.")
    architecture = architecture_of(folder.config)
    header = gguf.GGUFWriter(None, architecture.name)
    _write_metadata(header, folder, architecture, kinds["experts"])
    write_tokenizer(header, pretrained.load_tokenizer(folder.path), folder.config.vocab_size, pre)
    empty = folder.empty_model()
    experts_weights = _expert_weights(folder, empty)
    try:
        tensors = list(_plan(folder, empty, experts_weights, architecture, kinds))
        size = _write_file(header, tensors, folder, out, progress)
    finally:
        experts_weights.close()
    return Written(out, architecture.name, len(tensors), size)


def _write_file(
    header: "gguf.GGUFWriter",
    tensors: list[_Tensor],
    folder: ModelFolder,
    out: Path,
    progress: ProgressCallback | None,
) -> int:
    total = sum(tensor.num_bytes for tensor in tensors)
    free = shutil.disk_usage(out.absolute().parent).free
    if total > free:
        raise ConfigError(
            f"{out} would take {format_bytes(total)}, and its disk has {format_bytes(free)}. Give a file on another "
            "disk, or a smaller --type."
        )
    with atomic_file(out) as arriving:
        _write(header, tensors, arriving, total, progress)
        folder.checkpoint.check_unchanged()
        return arriving.stat().st_size


def _write_metadata(header: "gguf.GGUFWriter", folder: ModelFolder, architecture: Architecture, kind: str) -> None:
    assert architecture.metadata is not None, "an architecture that is written"
    header.add_name(folder.path.name)
    header.add_file_type(EXPERT_KINDS[kind])
    header.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_keys(header, architecture.metadata(folder.config))


def add_keys(header: "gguf.GGUFWriter", keys: Mapping[str, Any]) -> None:
    """Add keys of metadata, each as the type that its value has.

    Args:
        header: of the file that is written.
        keys: truth values, whole numbers (uint32), floats (float32), texts, and lists of one of these.
    """
    for key, value in keys.items():
        if isinstance(value, bool):
            header.add_bool(key, value)
        elif isinstance(value, int):
            header.add_uint32(key, value)
        elif isinstance(value, float):
            header.add_float32(key, value)
        elif isinstance(value, str):
            header.add_string(key, value)
        else:
            header.add_array(key, value)


def _plan(
    folder: ModelFolder,
    empty: PreTrainedModel,
    weights: "EagerWeights | StoredWeights",
    architecture: Architecture,
    kinds: dict[str, str],
) -> Iterator[_Tensor]:
    """Yield every tensor, in the model's order."""
    rules = architecture.rules(folder.config)
    dense = EagerDenseWeights(folder, empty)
    for name, values in architecture.extra(folder.config).items():
        yield _Tensor(name, tuple(values.shape), gguf.GGMLQuantizationType.F32, partial(iter, [values]))
    for name, shape in dense.shapes.items():
        rule = rule_of(rules, name)
        written = rule.change.write(torch.empty(shape, device="meta"), folder.config)
        for place, (target, form) in enumerate(zip(tensor_names(rule, name), written, strict=True)):

            def parts(name: str = name, rule: Rule = rule, place: int = place) -> Iterator[torch.Tensor]:
                yield rule.change.write(dense.read(name), folder.config)[place]

            yield _Tensor(target, tuple(form.shape), _kind(target, form.shape, kinds["matrices"]), parts)
    for layer, (path, module) in enumerate(experts_interface.experts_modules(empty)):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            shape = tuple(parameter.shape)
            rule = rule_of(rules, f"{path}.{name}")
            targets = tensor_names(rule, f"{path}.{name}")
            turned = len(shape) == 3 and bool(module.is_transposed)
            first = _of_expert(torch.empty(shape[1:], device="meta"), turned, rule, 0).shape
            for place, target in enumerate(targets):

                def stack(
                    layer: int = layer, name: str = name, rule: Rule = rule, place: int = place, turned: bool = turned,
                    count: int = shape[0],
                ) -> Iterator[torch.Tensor]:  # fmt: skip
                    for expert in range(count):
                        yield _of_expert(weights.parameter(layer, name, expert), turned, rule, place)

                full = (shape[0], *first)
                yield _Tensor(target, full, _kind(target, full, kinds["experts"]), stack)


def _expert_weights(folder: ModelFolder, empty: PreTrainedModel) -> "EagerWeights | StoredWeights":
    """Open a folder's experts: by transformers' conversion, or, of packed and quantised ones, as moeflow reads them."""
    if not folder.packed and quantizer.quantization_scheme(folder.config) is None:
        return EagerWeights(folder, torch.float32)
    store = ExpertStore(folder.expert_files, folder.layers(empty), stamps=folder.expert_stamps)
    return StoredWeights(store, torch.float32, experts_interface.transposed(empty))


def _of_expert(value: torch.Tensor, turned: bool, rule: Rule, place: int) -> torch.Tensor:
    """Return an expert's part of a tensor, of the expert's parameter."""
    value = value.T if turned else value
    count = len(rule.tensors)
    return value[place::count] if rule.interleaves else value.chunk(count)[place]


def _kind(name: str, shape: Any, kind: str) -> "gguf.GGMLQuantizationType":
    """Return the type of a tensor."""
    stem = name.removesuffix(".weight")
    if len(shape) == 1 or stem == name or stem.endswith(_IN_FLOAT32):
        return gguf.GGMLQuantizationType.F32
    if kind == "q4_0" and stem in ("token_embd", "output"):
        kind = "q8_0"
    found = gguf.GGMLQuantizationType[kind.upper()]
    return found if shape[-1] % gguf.GGML_QUANT_SIZES[found][0] == 0 else gguf.GGMLQuantizationType.F16


def _write(
    header: "gguf.GGUFWriter", tensors: list[_Tensor], path: Path, total: int, progress: ProgressCallback | None
) -> None:
    for name, shape, kind, _ in tensors:
        header.add_tensor_info(name, shape, np.dtype(np.float32), 0, raw_dtype=kind)
    for info, tensor in zip(header.tensors[0].values(), tensors, strict=True):
        info.nbytes = tensor.num_bytes
    try:
        header.write_header_to_file(path)
        header.write_kv_data_to_file()
        header.write_ti_data_to_file()
    finally:
        header.close()
    done = 0
    with path.open("ab") as file:
        for tensor in tensors:
            file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
            begin = file.tell()
            for part in tensor.parts():
                for chunk in _chunks(part):
                    done += file.write(_encoded(chunk, tensor))
                    if progress:
                        progress(done, total)
            assert file.tell() - begin == tensor.num_bytes, f"{tensor.name} has another size than announced"
        file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def _chunks(part: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a part's rows, some at a time."""
    rows = part.reshape(-1, part.shape[-1]) if part.dim() > 1 else part.reshape(1, -1)
    yield from rows.split(max(1, _CHUNK // max(1, rows.shape[1])))


def _encoded(values: torch.Tensor, tensor: _Tensor) -> bytes:
    """Return rows of values as the file holds them."""
    types = gguf.GGMLQuantizationType
    if tensor.kind == types.BF16:
        return values.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
    if tensor.kind == types.F16:
        half = values.to(torch.float16)
        if not torch.isfinite(half).all():
            raise ConfigError(f"{tensor.name} has values that float16 cannot hold. Give --type bf16 or q8_0.")
        return half.contiguous().numpy().tobytes()
    full = values.float().contiguous().numpy()
    return (full if tensor.kind == types.F32 else gguf.quantize(full, tensor.kind)).tobytes()
