"""The door to transformers: every name moeflow uses of it stands in this file.

Four uses: register the function behind the experts interface, load a model without its experts (and the dense weights
of a quantised checkpoint as plain values), ask transformers which checkpoint tensor feeds which expert (its own
conversion mapping, so that no list of architectures is kept here), and put another attention function before a
model's own.
"""

import copy
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moeflow.checkpoint import TensorEntry, open_checkpoint
from moeflow.errors import CheckpointError, ModelSourceError, UnsupportedModelError
from moeflow.native import NativeScheme, StoredMatrix, find_matrices, read_scheme
from moeflow.native_values import values

try:
    import transformers
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoTokenizer,
        CompileConfig,
    )
    from transformers.cache_utils import Cache, DynamicCache
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:  # pragma: no cover - depends on the installed version
    raise UnsupportedModelError(
        f"moeflow needs transformers 5.17 or newer; this installation lacks a part it uses ({error}). "
        "Run: pip install -U 'transformers>=5.17'"
    ) from error

IMPLEMENTATION = "moeflow"
KeyValueCache = Cache
causal_rule = causal_mask_function  # (batch, head, query position, key position) -> bool
_PACKED = "moeflow_packed"
_KEY_VALUE_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}  # a dummy keeps nothing
_TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k",
)


def _experts_forward(module, hidden_states, top_k_index, top_k_weights):
    return module._moeflow(hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


@register_quantization_config(IMPLEMENTATION)
class _WithoutExperts(QuantizationConfigMixin):
    """Carries a callback into `from_pretrained`; it is gone from the model when that returns.

    Args:
        on_skeleton: called with the empty model.
        scheme: how the checkpoint is quantised, in place of its own quantization_config; None where it is not.
    """

    def __init__(self, on_skeleton=None, scheme: NativeScheme | None = None, **kwargs):
        self.quant_method = IMPLEMENTATION
        self.on_skeleton = on_skeleton
        self.scheme = scheme
        self.problems: list[str] = []  # with dense weights: transformers would only log what is raised meanwhile

    def __deepcopy__(self, memo):
        return self

    def to_dict(self):
        return {"quant_method": IMPLEMENTATION}


@register_quantizer(IMPLEMENTATION)
class _ExpertsRemover(HfQuantizer):
    """Takes the experts' parameters off the empty model, so that their checkpoint entries stay unread.

    The dense weights of a quantised checkpoint become plain values, each as it is loaded.
    """

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = quantization_config.scheme is not None  # else transformers casts codes to floats

    def get_weight_conversions(self):
        scheme = self.quantization_config.scheme
        if scheme is None or scheme.method == "mxfp4":  # of experts only
            return []
        operation = _Dequantize(scheme, self.quantization_config.problems)
        return [WeightConverter(list(operation.endings), ".weight", [operation])]

    def update_weight_conversions(self, weight_conversions, *args):
        return weight_conversions + self.get_weight_conversions()

    def get_new_dtype(self, converter, param, dtype):
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, _Dequantize):
                operation.dtype = dtype  # of its own target: every target has its own converter
                return None
        return dtype

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


class _Dequantize(ConversionOps):
    """Makes a dense weight of its quantised pieces, or passes on one that is not quantised.

    Args:
        scheme: how the checkpoint is quantised.
        problems: gets a sentence for every weight that could not be made.
    """

    def __init__(self, scheme: NativeScheme, problems: list[str]):
        self.scheme = scheme
        self.problems = problems
        self.dtype = None
        stem = "" if scheme.stands_for else ".weight"  # what the names of all pieces begin with
        self.endings = {re.escape(stem + ending) + "$": ending for ending in (scheme.codes, *scheme.companions)}

    def __deepcopy__(self, memo):
        return _Dequantize(self.scheme, self.problems)

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        pieces = {
            self.endings[pattern]: value[0] if isinstance(value, list) else value
            for pattern, value in input_dict.items()
        }
        parameter = model.get_parameter(full_layer_name)
        dtype = self.dtype or parameter.dtype
        if len(pieces) == 1:
            (value,) = pieces.values()
            return {full_layer_name: value.to(dtype)}
        try:
            return {full_layer_name: values(pieces, self.scheme, tuple(parameter.shape), dtype)}
        except ValueError as error:
            self.problems.append(f"{full_layer_name} cannot be used: {error}")
            return {full_layer_name: torch.zeros(parameter.shape, dtype=dtype)}


def resolve_folder(model: str | Path, **download_kwargs) -> Path:
    """Return the local folder of `model`, fetching it from the hub when it is an id.

    Raises:
        ModelSourceError: neither a folder nor an id the hub (or its local cache) can serve.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        raise ModelSourceError(
            f"{model} is not a folder. Give a folder with a checkpoint, or a hub id such as org/name."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(model),
                allow_patterns=["*.json", "*.safetensors", "*.moeflow", "*.jinja", "*.model", "*.txt", "*.py"],
                ignore_patterns=["original/*", "consolidated*"],
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
        UnsupportedModelError: an unknown architecture, or a checkpoint quantised by a method that is not read.
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
    native_scheme(config, str(folder))
    return config


def native_scheme(config, source: str = "the model") -> NativeScheme | None:
    """Tell how the checkpoint of this config is quantised, None where it is not.

    Args:
        config: of a folder, or of an empty model that `load_without_experts` shows.
        source: what the config is of, for errors.

    Raises:
        UnsupportedModelError: by a method that is not read.
    """
    for part in (config, config.get_text_config(decoder=True)):
        quantization = getattr(part, "quantization_config", None)
        if isinstance(quantization, _WithoutExperts):
            return quantization.scheme
        if quantization is not None:
            return read_scheme(quantization if isinstance(quantization, dict) else quantization.to_dict(), source)
    return None


def load_tokenizer(folder: Path):
    """Return the model's tokenizer.

    Raises:
        CheckpointError: there is none that transformers can load.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} has no tokenizer that transformers can load ({error}). Download it again."
        ) from error


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
        The model, its dense weights unquantised, and transformers' loading info.

    Raises:
        CheckpointError: a piece of a quantised dense weight is missing or does not fit.
        UnsupportedModelError: a quantised dense weight that is not the model's as it is.
    """
    cls, scheme = model_class(config), native_scheme(config, str(folder))
    stored = {}
    if scheme is not None:
        stored = find_matrices(open_checkpoint(folder).tensors, scheme)
        config = copy.deepcopy(config)  # the checkpoint's own quantiser must not see it
        for part in (config, config.get_text_config(decoder=True)):
            part.__dict__.pop("quantization_config", None)

    def check_and_strip(empty):
        _check_dense(empty, stored)
        on_skeleton(empty)

    loading = _WithoutExperts(check_and_strip, scheme)
    loaded = cls.from_pretrained(
        folder,
        config=config,
        quantization_config=loading,
        experts_implementation=IMPLEMENTATION,
        use_safetensors=True,
        output_loading_info=True,
        **hf_kwargs,
    )
    if loading.problems:
        raise CheckpointError(
            f"{folder}: {loading.problems[0]}. Download the checkpoint again, or use another quantisation of the model."
        )
    return loaded


def _check_dense(model, stored: dict[str, StoredMatrix]) -> None:
    """Refuse quantised dense weights that cannot be loaded one by one, before anything large is read."""
    if not stored:
        return
    parameters, renamings, converters = model.state_dict(), *_conversions(model)
    for name, matrix in stored.items():
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        parameter = parameters.get(target)
        if parameter is None or parameter.dim() == 3:  # stacked experts
            continue
        if pattern is not None:
            raise UnsupportedModelError(
                f"{name} is quantised, and {type(model).__name__} has it in another form ({target}), into which "
                "moeflow does not bring quantised dense weights. Use the model's float32 or bfloat16 checkpoint."
            )
        if tuple(parameter.shape) != matrix.shape:
            raise CheckpointError(
                f"{target} is {list(parameter.shape)}, the checkpoint's {name} {list(matrix.shape)} (out, in "
                "features). Its config.json is of another model, or names another quantisation."
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
            f"{type(model).__name__} has no routed experts that transformers runs through its experts "
            "interface: it is a "
            "dense model, or a family that cannot be offloaded. Load it with AutoModelForCausalLM.from_pretrained."
        )
    return found


def experts_arguments(args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what an experts module was called with, as its hooks see it: hidden_states, top_k_index, top_k_weights."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    return (*args, *(kwargs[name] for name in names[len(args) :]))


def transposed(model) -> list[bool]:
    """Tell for each experts module whether it stores its matrices [in, out]."""
    return [bool(module.is_transposed) for _, module in experts_modules(model)]


def num_experts_per_tok(model) -> int:
    """Return the largest number of experts a token is routed to, as the routers and the config name it."""
    owners = [model.config, model.config.get_text_config(decoder=True)]
    for path, module in experts_modules(model):
        block = model.get_submodule(path.rpartition(".")[0])
        owners += [module, getattr(module, "config", None), block, *block.children()]
    found = [getattr(owner, name, None) for owner in owners for name in _TOP_K_NAMES]
    found = [value for entry in found for value in (entry if isinstance(entry, (list, tuple)) else [entry])]
    return max((value for value in found if type(value) is int), default=1)


def router_parameters(block) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Find a MoE block's router: its weight [E, H] and bias [E], each None where there is no single such parameter."""
    experts = next((module for module in block.children() if hasattr(module, "_apply_gate")), None)
    num_experts = getattr(experts, "num_experts", None)
    found = {
        name: parameter
        for name, parameter in block.named_parameters()
        if "shared" not in name and parameter.dim() == 2 and parameter.shape[0] == num_experts
    }
    if len(found) != 1:
        return None, None
    ((name, weight),) = found.items()
    bias = dict(block.named_parameters()).get(name.removesuffix("weight") + "bias")
    return weight, bias if bias is not None and bias.shape == weight.shape[:1] else None


def take_experts_off(model) -> None:
    """Remove the routed experts' parameters from an empty model and keep the loader quiet about them."""
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    scheme = native_scheme(model.config)
    if scheme is not None and scheme.method == "gptq":
        ignored.add(r"\.bias$")  # some tools write a bias of zeros beside every matrix
    for path, module in experts_modules(model):
        tail = path.removeprefix(f"{model.base_model_prefix}.")
        if scheme is not None:  # the pieces have other names than the parameters
            ignored.add(r"(^|\.)" + re.escape(f"{tail}."))
        for name in list(module._parameters):
            # What stays is an attribute of the right shape without memory: some families' init code looks at it.
            stub = module._parameters.pop(name)
            if stub is not None:
                stub._is_hf_initialized = True
            module.__dict__[name] = stub
            ignored.add(r"(^|\.)" + re.escape(f"{tail}.{name}") + "$")
            for submodule in model.modules():
                getattr(submodule, "all_tied_weights_keys", {}).pop(f"{path}.{name}", None)
        module._is_hf_initialized = True
    model._keys_to_ignore_on_load_unexpected = ignored


def own_dense_weights(model) -> None:
    """Move parameters and buffers on the CPU out of the checkpoint's memory mapping, one at a time.

    Mapped weights would be paged out under memory pressure, and lie at whatever offset the file has, on which the
    last bit of a matrix product depends.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def compile_decoding(model) -> None:
    """Let generate() compile its decode steps, on any device: a static key-value cache, and torch.compile."""
    # Checks of what the compiler itself has allocated would take as long as the smaller kernels.
    compiling = CompileConfig(mode=None, fullgraph=False, options={"size_asserts": False})
    compiling._compile_all_devices = True  # without it transformers compiles on accelerators only
    model.generation_config.cache_implementation = "static"
    model.generation_config.compile_config = compiling


def compiles_decoding(model) -> bool:
    """Tell whether `compile_decoding` was called."""
    return getattr(getattr(model, "generation_config", None), "compile_config", None) is not None


def cache_of(kwargs: dict):
    """Return the key-value cache that a forward pass was called with, None where there is none."""
    past = kwargs.get("past_key_values")
    return kwargs.get("cache") if past is None else past  # its name from transformers 5.24 on


def continues_cache(kwargs: dict, num_positions: int) -> bool:
    """Tell whether a forward pass called with these arguments continues earlier positions: decode, not prefill."""
    past = cache_of(kwargs)
    if hasattr(past, "get_seq_length"):
        return bool(past.get_seq_length() > 0)
    # a cache without a length (state-space models): one position at a time is decode
    return past is not None and num_positions == 1


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


def register_packed_attention(attention: Callable, mask: Callable) -> None:
    """Register the functions that `attention_replaced` puts in place of a model's own."""
    ALL_ATTENTION_FUNCTIONS.register(_PACKED, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_PACKED, mask)


@contextmanager
def attention_replaced(model) -> Iterator[dict[int, str]]:
    """Let the model's attention be the registered function, and its masks the registered masks.

    Yields:
        The implementation that each config has otherwise, by the config's id: "sdpa" or "eager".
    """
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    own = {key: name if name == "eager" or not model._supports_sdpa else "sdpa" for key, name in before.items()}
    own = {key: name if name in ("eager", "sdpa") else "eager" for key, name in own.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = _PACKED
        yield own
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def attention_function(module, implementation: str) -> Callable:
    """Return the function that an attention module would call with this implementation."""
    of_model = sys.modules[type(module).__module__]
    eager = getattr(of_model, "eager_attention_forward", None)
    return getattr(of_model, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS).get_interface(implementation, eager)


def check_key_value_cache(model) -> None:
    """Refuse a model that keeps anything else of earlier positions than keys and values.

    Raises:
        UnsupportedModelError: the message names what it keeps.
    """
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__} is not a decoder that generates token by token.")
    kept = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers} - _KEY_VALUE_LAYERS
    if kept:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps other state than keys and values ({', '.join(sorted(kept))}), of which the "
            "engine knows nothing. Call model.generate instead."
        )


def packed_forward(model, input_ids: torch.Tensor, position_ids: torch.Tensor, cache, keep: torch.Tensor):
    """Run one pass and return the logits [len(keep), V] of the tokens at these places.

    Args:
        input_ids: [1, N].
        position_ids: [1, N].
        keep: [S], places in 0..N-1.
    """
    known = inspect.signature(model.forward).parameters
    arguments = {"cache" if "cache" in known else "past_key_values": cache}
    if "logits_to_keep" in known:
        arguments["logits_to_keep"] = keep
    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=True, **arguments).logits[0]
    return logits if "logits_to_keep" in known else logits[keep]


def context_positions(model) -> int | None:
    """Return how many positions the model was made for; None where its config does not say."""
    found = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def end_tokens(model) -> frozenset[int]:
    """Return the tokens at which generation ends."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return frozenset([found] if isinstance(found, int) else found or ())


def _natural_order(name: str) -> list:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _conversions(model) -> tuple[list, list]:
    """Return transformers' rules for this model's checkpoints: renamings, and converters."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in mapping if isinstance(entry, WeightConverter)]


def collect_expert_tensors(model, tensors: dict[str, TensorEntry]) -> dict[str, tuple]:
    """Group a checkpoint's tensors by the expert parameter they feed, by transformers' own conversion mapping.

    Args:
        model: the empty model, experts still on it.
        tensors: the checkpoint's tensors by their names in the checkpoint.

    Returns:
        {parameter: (converter or None, {source pattern: [(tensor name, entry)]}, place among the converter's targets)}
    """
    parameters = model.state_dict()
    expert_names = {f"{path}.{name}" for path, module in experts_modules(model) for name in module._parameters}
    renamings, converters = _conversions(model)
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
    for name, stored in model.all_tied_weights_keys.items():  # experts used from two places are stored once
        if name not in collected and stored in collected:
            collected[name] = collected[stored]
    return collected
