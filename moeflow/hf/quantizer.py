"""The quantiser through which transformers loads a model without its experts.

transformers lets a quantiser change the empty model before weights are loaded, and make each weight of the
checkpoint's tensors. This one takes the experts off, and makes plain dense weights of a quantised checkpoint's pieces.
The loaded model knows nothing of it.
"""

import re
from collections.abc import Callable
from typing import Any

import torch

from moeflow.checkpoint.prequantized.scheme import QuantizationScheme, StoredMatrix, read_scheme
from moeflow.checkpoint.prequantized.values import values
from moeflow.errors import CheckpointError, UnsupportedModelError
from moeflow.hf.experts_interface import IMPLEMENTATION, conversions, experts_modules
from moeflow.hf.version import parts_of_transformers

with parts_of_transformers():
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.core_model_loading import ConversionOps, WeightConverter, rename_source_key
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin


@register_quantization_config(IMPLEMENTATION)
class WithoutExperts(QuantizationConfigMixin):
    """Carries a callback into `from_pretrained`; it is gone from the model when that returns.

    Args:
        on_empty: called with the empty model.
        scheme: the checkpoint's quantisation, in place of its own quantization_config; None where it has none.
    """

    quant_method: Any

    def __init__(
        self,
        on_empty: Callable[[PreTrainedModel], None] | None = None,
        scheme: QuantizationScheme | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = IMPLEMENTATION
        self.on_empty = on_empty
        self.scheme = scheme
        self.problems: list[str] = []  # with dense weights: transformers would only log an exception

    def __deepcopy__(self, memo: dict) -> "WithoutExperts":
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": IMPLEMENTATION}


@register_quantizer(IMPLEMENTATION)
class _ExpertsRemover(HfQuantizer):
    """Takes the experts' parameters off the empty model, so that their checkpoint entries stay unread.

    The dense weights of a quantised checkpoint become plain values, each as it is loaded.
    """

    quantization_config: WithoutExperts

    def __init__(self, quantization_config: WithoutExperts, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = quantization_config.scheme is not None  # else transformers casts codes to floats

    def get_weight_conversions(self) -> list[WeightConverter]:
        scheme = self.quantization_config.scheme
        if scheme is None or scheme.method == "mxfp4":  # of experts only
            return []
        operation = _Dequantize(scheme, self.quantization_config.problems)
        return [WeightConverter(list(operation.endings), ".weight", [operation])]

    def update_weight_conversions(self, weight_conversions: list, *args: Any) -> list:
        return weight_conversions + self.get_weight_conversions()

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, _Dequantize):
                operation.dtype = dtype  # of its own target: every target has its own converter
                return None
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        assert self.quantization_config.on_empty is not None, "load_without_experts gives it"
        self.quantization_config.on_empty(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.remove_quantization_config(model)
        configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
        for config in configs:
            if getattr(config, "_is_quantized", False):
                config._is_quantized = False
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class _Dequantize(ConversionOps):
    """Makes a dense weight of its quantised pieces, or passes on one that is not quantised.

    Args:
        scheme: how the checkpoint is quantised.
        problems: receives a sentence for every weight that could not be made.
    """

    def __init__(self, scheme: QuantizationScheme, problems: list[str]) -> None:
        self.scheme = scheme
        self.problems = problems
        self.dtype: torch.dtype | None = None
        stem = "" if scheme.stands_for else ".weight"  # what the names of all pieces begin with
        self.endings = {re.escape(stem + ending) + "$": ending for ending in (scheme.codes, *scheme.companions)}

    def __deepcopy__(self, memo: dict) -> "_Dequantize":
        return _Dequantize(self.scheme, self.problems)

    # transformers annotates other arguments than it gives: its own operations differ in the same way.
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
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


def quantization_scheme(config: PreTrainedConfig, source: str = "the model") -> QuantizationScheme | None:
    """Return the quantisation of this config's checkpoint, None where it has none.

    Args:
        config: of a folder, or of an empty model that `load_without_experts` shows.
        source: of the config, for errors.

    Raises:
        UnsupportedModelError: by a method that is not read.
    """
    for part in (config, config.get_text_config(decoder=True)):
        quantization = getattr(part, "quantization_config", None)
        if isinstance(quantization, WithoutExperts):
            return quantization.scheme
        if quantization is not None:
            return read_scheme(quantization if isinstance(quantization, dict) else quantization.to_dict(), source)
    return None


def check_quantised(model: PreTrainedModel, stored: dict[str, StoredMatrix]) -> None:
    """Refuse quantised dense weights that cannot be loaded one by one, before anything large is read."""
    if not stored:
        return
    parameters, renamings, converters = model.state_dict(), *conversions(model)
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


def take_experts_off(model: PreTrainedModel) -> None:
    """Remove the routed experts' parameters from an empty model and keep the loader quiet about them."""
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    scheme = quantization_scheme(model.config)
    if scheme is not None and scheme.method == "gptq":
        ignored.add(r"\.bias$")  # some tools write a bias of zeros beside every matrix
    for path, module in experts_modules(model):
        tail = path.removeprefix(f"{model.base_model_prefix}.")
        if scheme is not None:  # the pieces have other names than the parameters
            ignored.add(r"(^|\.)" + re.escape(f"{tail}."))
        for name in list(module._parameters):
            # An attribute of the right shape without memory stays: some families' init code reads it.
            stub: Any = module._parameters.pop(name)
            if stub is not None:
                stub._is_hf_initialized = True
            module.__dict__[name] = stub
            ignored.add(r"(^|\.)" + re.escape(f"{tail}.{name}") + "$")
            for submodule in model.modules():
                getattr(submodule, "all_tied_weights_keys", {}).pop(f"{path}.{name}", None)
        module._is_hf_initialized = True
    model._keys_to_ignore_on_load_unexpected = ignored
