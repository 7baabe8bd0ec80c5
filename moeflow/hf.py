"""The door to transformers: every name moeflow uses of it stands in this file.

Three uses: register the function behind the experts interface, load a model without its experts, and ask
transformers which checkpoint tensor feeds which expert (its own conversion mapping, so that no list of
architectures is kept here).
"""

import copy
import json
import re
from array import array
from collections.abc import Callable
from pathlib import Path

import torch

from moeflow.checkpoint import TensorEntry
from moeflow.core import LayerLayout, RecordLayout
from moeflow.errors import CheckpointError, ModelSourceError, UnsupportedModelError
from moeflow.layers import Conversion, LayerSource, PieceTable

try:
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:  # pragma: no cover - depends on the installed version
    raise UnsupportedModelError(
        f"moeflow needs transformers 5.17 or newer; this installation lacks a part it uses ({error}). "
        "Run: pip install -U 'transformers>=5.17'"
    ) from error

IMPLEMENTATION = "moeflow"
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k", "top_k")


def _experts_forward(module, hidden_states, top_k_index, top_k_weights):
    return module._moeflow(hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


@register_quantization_config(IMPLEMENTATION)
class _WithoutExperts(QuantizationConfigMixin):
    """Carries a callback into `from_pretrained`; it is gone from the model when that returns."""

    def __init__(self, on_skeleton=None, **kwargs):
        self.quant_method = IMPLEMENTATION
        self.on_skeleton = on_skeleton

    def __deepcopy__(self, memo):
        return self

    def to_dict(self):
        return {"quant_method": IMPLEMENTATION}


@register_quantizer(IMPLEMENTATION)
class _ExpertsRemover(HfQuantizer):
    """Takes the experts' parameters off the empty model, so that their checkpoint entries stay unread."""

    def _process_model_before_weight_loading(self, model, **kwargs):
        self.quantization_config.on_skeleton(model)

    def _process_model_after_weight_loading(self, model, **kwargs):
        self.remove_quantization_config(model)
        for module in model.modules():
            if hasattr(module, "config") and getattr(module.config, "_is_quantized", False):
                module.config._is_quantized = False
        return model

    def is_serializable(self):
        return False

    @property
    def is_trainable(self):
        return False


def resolve_folder(model: str | Path, **download_kwargs) -> Path:
    """Return the local folder of `model`, fetching it from the hub when it is an id.

    Raises:
        ModelSourceError: neither a folder nor an id the hub (or its local cache) can serve.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        raise ModelSourceError(f"{model} is not a folder. Give a folder with a checkpoint, or a hub id such as org/name.")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(model),
                allow_patterns=["*.json", "*.safetensors", "*.moeflow", "*.jinja", "*.model", "*.txt"],
                **download_kwargs,
            )
        )
    except (OSError, ValueError) as error:
        raise ModelSourceError(
            f"{model} is not a folder here and could not be fetched from the hub ({type(error).__name__}: {error}). "
            "Check the name and the network, or download the model and give its folder."
        ) from error


def load_config(folder: Path, **config_kwargs):
    """Read config.json and refuse what this version cannot run.

    Raises:
        CheckpointError: no or a corrupt config.json.
        UnsupportedModelError: an unknown architecture or a quantised checkpoint.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no config.json. Give a folder written by save_pretrained or the hub.")
    try:
        json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}). Download it again.") from None
    try:
        config = AutoConfig.from_pretrained(folder, **config_kwargs)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not know the model in {folder}: {error} "
            "A newer transformers may (pip install -U transformers)."
        ) from error
    for part in (config, config.get_text_config(decoder=True)):
        quantization = getattr(part, "quantization_config", None)
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
            method = getattr(method, "value", method)
            raise UnsupportedModelError(
                f"{folder} is quantised with {method}, which this version does not read yet. "
                "Use the model's float32, bfloat16 or float16 checkpoint."
            )
    return config


def model_class(config):
    """Return the transformers class that loads this config: causal LM first, then what its architecture says."""
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return AutoModel


def empty_model(config, dtype: torch.dtype | None = None):
    """Build the model on the meta device, with experts and without any weight."""
    cls = model_class(config)
    config = copy.deepcopy(config)
    dtype = dtype or getattr(config, "dtype", None) or config.get_text_config(decoder=True).dtype or torch.float32
    with torch.device("meta"):
        return cls.from_config(config, dtype=dtype) if hasattr(cls, "from_config") else cls(config).to(dtype)


def load_without_experts(folder: Path, config, on_skeleton: Callable, **hf_kwargs):
    """Run `from_pretrained` for everything but the routed experts.

    Args:
        on_skeleton: called with the empty model; takes the experts off it (see `take_experts_off`).

    Returns:
        The model and transformers' loading info.
    """
    cls = model_class(config)
    return cls.from_pretrained(
        folder,
        config=config,
        quantization_config=_WithoutExperts(on_skeleton),
        experts_implementation=IMPLEMENTATION,
        use_safetensors=True,
        output_loading_info=True,
        **hf_kwargs,
    )


def experts_modules(model) -> list[tuple[str, torch.nn.Module]]:
    """List the modules transformers runs through its experts interface, in the model's order.

    Raises:
        UnsupportedModelError: there is none.
    """
    marks = ("is_transposed", "has_bias", "has_gate", "_apply_gate")
    found = [(name, module) for name, module in model.named_modules() if all(hasattr(module, mark) for mark in marks)]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no routed experts that transformers runs through its experts interface: it is a "
            "dense model, or a family that cannot be offloaded. Load it with AutoModelForCausalLM.from_pretrained."
        )
    return found


def num_experts_per_tok(model) -> int:
    """Return the largest number of experts a token is routed to, as the routers and the config name it."""
    owners = [model.config, model.config.get_text_config(decoder=True)]
    for path, module in experts_modules(model):
        block = model.get_submodule(path.rpartition(".")[0])
        owners += [module, getattr(module, "config", None), block, *block.children()]
    found = [getattr(owner, name, None) for owner in owners for name in _TOP_K_NAMES]
    found = [value for entry in found for value in (entry if isinstance(entry, (list, tuple)) else [entry])]
    return max((value for value in found if type(value) is int), default=1)


def take_experts_off(model) -> None:
    """Remove the routed experts' parameters from an empty model and keep the loader quiet about them."""
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    for path, module in experts_modules(model):
        for name in list(module._parameters):
            # What stays is an attribute of the right shape without memory: some families' init code looks at it.
            stub = module._parameters.pop(name)
            if stub is not None:
                stub._is_hf_initialized = True
            module.__dict__[name] = stub
            tail = path.removeprefix(f"{model.base_model_prefix}.")
            ignored.add(r"(^|\.)" + re.escape(f"{tail}.{name}") + "$")
            for submodule in model.modules():
                getattr(submodule, "all_tied_weights_keys", {}).pop(f"{path}.{name}", None)
        module._is_hf_initialized = True
    model._keys_to_ignore_on_load_unexpected = ignored


def own_dense_weights(model) -> None:
    """Move the parameters on the CPU out of the checkpoint's memory mapping, one at a time.

    Mapped weights would be paged out under memory pressure, and lie at whatever offset the file has, on which the
    last bit of a matrix product depends.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def key_value_bytes_per_position(model) -> int:
    """Estimate the key-value cache of one position, from the attention modules' projections."""
    features = 0
    for module in model.modules():
        for names in (("k_proj", "v_proj"), ("kv_b_proj",), ("qkv_proj",), ("query_key_value",)):
            projections = [getattr(module, name, None) for name in names]
            if all(isinstance(projection, torch.nn.Linear) for projection in projections):
                features += sum(projection.out_features for projection in projections)
                break
    return features * model.dtype.itemsize


def map_experts(model, tensors: dict[str, TensorEntry]) -> list[LayerSource]:
    """Find every expert's bytes in a checkpoint, by transformers' own conversion mapping.

    Args:
        model: the empty model, experts still on it; their dtype is the dtype the records get.
        tensors: the checkpoint's tensors by their names in the checkpoint.

    Raises:
        CheckpointError: an expert's tensor is missing or has another shape than the model's.
        UnsupportedModelError: the checkpoint needs a conversion that mixes experts.
    """
    collected = _collect(model, tensors)
    for name, stored in model.all_tied_weights_keys.items():  # experts used from two places are stored once
        if name not in collected and stored in collected:
            collected[name] = collected[stored]
    return [_layer_source(path, module, collected) for path, module in experts_modules(model)]


def _natural_order(name: str) -> list:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _collect(model, tensors):
    """Group checkpoint entries by the expert parameter they feed: {parameter: (converter, {pattern: [entry]})}."""
    parameters = {name: value for name, value in model.state_dict().items()}
    expert_names = {f"{path}.{name}" for path, module in experts_modules(model) for name in module._parameters}
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    collected = {}
    for key in sorted(tensors, key=_natural_order):
        renamed, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if renamed not in parameters and key in parameters:
            renamed, pattern = rename_source_key(key, [], [], model.base_model_prefix, parameters)
        converter = by_pattern[pattern] if pattern is not None else None
        targets = [renamed]
        if converter is not None and len(converter.target_patterns) > 1:
            first = converter.target_patterns[0]
            targets = [renamed.replace(first, target) for target in converter.target_patterns]
        if not expert_names.intersection(targets):
            continue
        for place, target in enumerate(targets):
            _, groups, _ = collected.setdefault(target, (converter, {}, place))
            groups.setdefault(pattern or key, []).append((key, tensors[key]))
    return collected


def map_layouts(model) -> list[LayerLayout]:
    """Return how each layer's experts lie in a slot, from the empty model alone."""
    return [_layout(path, module) for path, module in experts_modules(model)]


def _layout(path, module) -> LayerLayout:
    parameters = {name: value for name, value in module._parameters.items() if value is not None}
    num_experts = next(iter(parameters.values())).shape[0]
    for name, value in parameters.items():
        if value.shape[0] != num_experts or value.dtype not in DTYPE_NAMES:
            raise UnsupportedModelError(
                f"{path}.{name} is {value.dtype} {list(value.shape)}: moeflow needs float experts stacked along the first "
                f"dimension, here {num_experts}."
            )
    return LayerLayout(
        path, num_experts, RecordLayout.pack([(n, DTYPE_NAMES[p.dtype], tuple(p.shape[1:])) for n, p in parameters.items()])
    )


def expert_tensor_names(model, tensors: dict[str, TensorEntry]) -> set[str]:
    """Return the names of the checkpoint tensors that feed routed experts."""
    return {key for _, groups, _ in _collect(model, tensors).values() for entries in groups.values() for key, _ in entries}


def _layer_source(path, module, collected) -> LayerSource:
    layout = _layout(path, module)
    copies, conversions = [], []
    for spec in layout.record.tensors:
        full_name = f"{path}.{spec.name}"
        if full_name not in collected:
            raise CheckpointError(
                f"no tensor of the checkpoint feeds {full_name}. The checkpoint is incomplete or of another model: "
                "compare its config.json with its weights, or download it again."
            )
        converter, groups, place = collected[full_name]
        operations = list(converter.operations) if converter is not None else []
        tables = _piece_tables(full_name, groups, layout.num_experts, place, converter)
        steps = _per_expert_steps(full_name, operations, tables, spec.shape)
        if not steps and all(table.dtype == spec.dtype for table in tables):
            offset = spec.offset
            for table in tables:
                copies.append((table, offset))
                offset += table.num_bytes
            written = offset - spec.offset
        else:
            conversions.append(Conversion(tuple(tables), _converter(converter, steps, tables, list(groups), spec)))
            written = sum(table.num_bytes * TORCH_DTYPES[spec.dtype].itemsize // TORCH_DTYPES[table.dtype].itemsize
                          for table in tables)  # fmt: skip
        if written != spec.num_bytes:
            raise CheckpointError(
                f"{full_name} needs {spec.num_bytes} bytes an expert, the checkpoint has {written} "
                f"({', '.join(f'{t.dtype} {list(t.shape)}' for t in tables)}). Its config.json is of another model."
            )
    return LayerSource(layout, tuple(copies), tuple(conversions))


def _piece_tables(name, groups, num_experts, place, converter) -> list[PieceTable]:
    """One table per source pattern, in the converter's order; stacked tensors are sliced along the expert."""
    order = [pattern for pattern in converter.source_patterns if pattern in groups] if converter else list(groups)
    splits_list = converter is not None and len(converter.target_patterns) > 1
    tables = []
    for pattern in order:
        members = groups[pattern]
        per_expert = "*" in pattern
        if splits_list and per_expert:  # one list of experts feeds several modules, in equal parts
            size = -(-len(members) // len(converter.target_patterns))
            members = members[place * size : (place + 1) * size]
        entries = [entry for _, entry in members]
        first = entries[0]
        if first.dtype not in TORCH_DTYPES:
            raise UnsupportedModelError(
                f"{members[0][0]} is stored as {first.dtype}, which this version does not read yet. "
                "Use the model's float32, bfloat16 or float16 checkpoint."
            )
        if per_expert:
            if len(entries) != num_experts:
                raise CheckpointError(
                    f"{name} has {num_experts} experts, the checkpoint holds {len(entries)} tensors {pattern!r} for it. "
                    "Download the checkpoint again."
                )
            odd = [key for key, entry in members if entry.shape != first.shape or entry.dtype != first.dtype]
            if odd:
                raise CheckpointError(f"{odd[0]} differs in shape or dtype from the other experts of {name}.")
            files, begins = array("H", [e.file for e in entries]), array("Q", [e.begin for e in entries])
            tables.append(PieceTable(first.dtype, first.shape, first.num_bytes, files, begins))
        else:
            if len(entries) != 1 or not first.shape or first.shape[0] != num_experts:
                raise CheckpointError(
                    f"{name} has {num_experts} experts, the checkpoint's {members[0][0]} has shape "
                    f"{list(first.shape)}. Its config.json is of another model."
                )
            stride = first.num_bytes // num_experts
            begins = array("Q", range(first.begin, first.begin + first.num_bytes, stride))
            files = array("H", [first.file]) * num_experts
            tables.append(PieceTable(first.dtype, first.shape[1:], stride, files, begins))
    return tables


def _per_expert_steps(name, operations, tables, shape) -> list:
    """Return the operations one expert's bytes still need, none if they only have to follow one another."""
    steps, moves_only = [], True
    for operation in operations:
        kind = type(operation).__name__
        if kind == "MergeModulelist" and operation.dim == 0:
            continue  # an expert is already one element of the list
        if kind == "ErnieFuseAndSplitTextVisionExperts" and (operation.stack_dim, operation.concat_dim) == (0, 1):
            continue  # the list was split in _piece_tables; what remains is a concatenation
        if kind == "Concatenate" and operation.dim == 1:
            steps.append(operation)  # rows of one expert follow one another
            continue
        if kind == "Transpose" and getattr(operation, "check_dims", False):
            if tables[0].shape == shape:
                continue
            operation = copy.copy(operation)
            operation.check_dims = False
        dims = [getattr(operation, dim) for dim in ("dim", "dim0", "dim1") if hasattr(operation, dim)]
        if kind not in ("Transpose", "Interleave", "Concatenate") or not dims or min(dims) < 1:
            raise UnsupportedModelError(
                f"{name} is stored in a form that needs {kind}, which cannot be done for one expert alone. Write the model "
                "anew with from_pretrained(...).save_pretrained(...) on a large machine, or report the model to moeflow."
            )
        steps.append(operation)
        moves_only = False
    return [] if moves_only else steps


def _converter(converter, steps, tables, patterns, spec) -> Callable:
    """Build the function that turns one expert's raw pieces into its tensor inside the record."""
    target_dtype = TORCH_DTYPES[spec.dtype]
    shapes = [(TORCH_DTYPES[table.dtype], table.shape) for table in tables]
    target = converter.target_patterns[:1] if converter else ["tensor"]
    concatenates = len(tables) > 1 and not any(type(step).__name__ == "Concatenate" for step in steps)

    def convert(pieces, record):
        tensors = [
            torch.from_numpy(piece).view(dtype).view(1, *shape) for piece, (dtype, shape) in zip(pieces, shapes, strict=True)
        ]
        if concatenates:
            tensors = [torch.cat(tensors, dim=1)]
        values = dict(zip(patterns if len(tensors) > 1 else target, tensors, strict=True))
        for step in steps:
            values = step.convert(values, source_patterns=list(values), target_patterns=target)
        (value,) = values.values()
        out = torch.from_numpy(record[spec.offset : spec.offset + spec.num_bytes]).view(target_dtype).view(1, *spec.shape)
        out.copy_(value)

    return convert
