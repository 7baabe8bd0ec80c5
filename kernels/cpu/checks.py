"""What the compiled kernels take: tensors in this machine's memory, of dtypes, shapes and strides that they know.

A call asks one question here, nearly always answered with yes; only a no is put into words. Knows tensors. Knows
nothing of the library, which checks counts and addresses itself.
"""

import torch

from moeflow.dtypes import TORCH_DTYPES
from moeflow.errors import ConfigError
from moeflow.kernels.cpu.structs import DTYPES
from moeflow.kernels.quantization.formats import WeightFormat

_ALLOWED = "contiguous on the CPU, in float32, bfloat16 or float16"


def takes_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether `linear` computes this: x [..., K], weight [N, K], bias [N] or None; K and N are not 0."""
    return (
        x.is_cpu
        and weight.is_cpu
        and x.dtype in DTYPES
        and weight.dtype in DTYPES
        and weight.is_contiguous()
        and weight.dim() == 2
        and weight.numel() > 0
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and (bias is None or _is_row(bias, weight.shape[0]))
    )


def takes_norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `rms_norm` computes this: x [..., H], weight [H] of the dtype of x; H is not 0."""
    return x.is_cpu and x.dim() > 0 and x.dtype == weight.dtype and weight.numel() > 0 and _is_row(weight, x.shape[-1])


def takes_experts(hidden_states: torch.Tensor, outputs: torch.Tensor) -> bool:
    """Whether `run_experts` reads and writes these: hidden_states [T, H], outputs [places, H] float32."""
    return (
        hidden_states.is_cpu
        and hidden_states.dtype in DTYPES
        and hidden_states.dim() == 2
        and _is_table(outputs)
        and hidden_states.shape[1] == outputs.shape[1]
    )


def takes_token(hidden_states: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int) -> bool:
    """Whether `run_token` computes this: hidden_states [1, H], top_k_weights [1, K]."""
    return (
        hidden_states.is_cpu
        and top_k_weights.is_cpu
        and hidden_states.dtype in DTYPES
        and top_k_weights.dtype in DTYPES
        and hidden_states.is_contiguous()
        and top_k_weights.is_contiguous()
        and top_k_weights.numel() == num_experts
    )


def takes_layer(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> bool:
    """Whether a layer computes this: hidden_states [T, H], top_k_index [T, K] int64, top_k_weights [T, K]."""
    return (
        hidden_states.is_cpu
        and top_k_index.is_cpu
        and top_k_weights.is_cpu
        and hidden_states.dtype in DTYPES
        and top_k_index.dtype is torch.int64
        and top_k_weights.dtype in DTYPES
        and hidden_states.dim() == 2
        and top_k_index.dim() == 2
        and top_k_index.shape == top_k_weights.shape
        and top_k_index.shape[0] == hidden_states.shape[0]
    )


def takes_outputs(outputs: torch.Tensor, top_k_weights: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `combine` computes this: outputs [T * K, H] float32, top_k_weights [T, K]."""
    return (
        _is_table(outputs)
        and top_k_weights.is_cpu
        and top_k_weights.dtype in DTYPES
        and dtype in DTYPES
        and top_k_weights.dim() == 2
        and top_k_weights.numel() == outputs.shape[0]
    )


def takes_product(x: torch.Tensor, out: torch.Tensor, shape: tuple[int, int]) -> bool:
    """Whether a matrix [N, K] is multiplied with x [..., K] into out [..., N]."""
    return (
        x.is_cpu
        and x.dtype in DTYPES
        and is_plain(out)
        and out.dtype == x.dtype
        and x.dim() > 0
        and x.shape[-1] == shape[1]
        and out.shape == (*x.shape[:-1], shape[0])
    )


def check_matrix(tensors: dict[str, torch.Tensor], name: str, spec: WeightFormat, shape: tuple[int, int]) -> None:
    """Refuse a matrix [N, K] whose stored tensors are not those of its format.

    Args:
        tensors: by name; a bias under "<name>_bias" has any float dtype.
        name: of the matrix.
        spec: its format.
        shape: [N, K].

    Raises:
        ConfigError: a size is not positive; a tensor is missing, elsewhere, or of another dtype or shape.
    """
    if min(shape) < 1:
        raise ConfigError(f"a matrix of {list(shape)} has no values. Give two positive sizes.")
    for part, dtype, size in spec.tensors(name, shape):
        found = tensors.get(part)
        if found is None or not is_plain(found) or found.dtype != TORCH_DTYPES[dtype] or found.shape != size:
            raise refusal(f"{part} of {spec.name} {list(shape)}", f"{dtype} {list(size)}", found)
    bias = tensors.get(f"{name}_bias")
    if bias is not None and not (is_plain(bias) and bias.shape == (shape[0],)):
        raise refusal(f"{name}_bias", f"[{shape[0]}]", bias)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any dtype lies in this machine's memory, not freed, in the order of its elements."""
    return tensor.is_cpu and tensor.is_contiguous() and (tensor.data_ptr() != 0 or not tensor.numel())


def refusal(what: str, wanted: str, *tensors: torch.Tensor | None) -> ConfigError:
    """Return the error of a call that no kernel takes.

    Args:
        what: the call.
        wanted: shapes of the tensors.
        tensors: as given.
    """
    found = "; ".join("none" if tensor is None else _described(tensor) for tensor in tensors)
    return ConfigError(f"{what}: no CPU kernel takes {found}. Allowed: {wanted}, {_ALLOWED}. Move, cast or copy them.")


def _is_row(tensor: torch.Tensor, length: int) -> bool:
    """Whether a tensor is [length] and lies in order."""
    return (
        tensor.is_cpu
        and tensor.dtype in DTYPES
        and tensor.is_contiguous()
        and tensor.dim() == 1
        and tensor.shape[0] == length
    )


def _is_table(tensor: torch.Tensor) -> bool:
    """Whether a tensor is float32 with rows and columns and lies in order."""
    return tensor.is_cpu and tensor.dtype is torch.float32 and tensor.is_contiguous() and tensor.dim() == 2


def _described(tensor: torch.Tensor) -> str:
    order = "" if tensor.layout == torch.strided and tensor.is_contiguous() else ", not contiguous"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}{order}"
