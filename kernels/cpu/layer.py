"""One layer's routed experts in one call of the compiled library, where all that its tokens ask for lie in memory.

Knows tensors, kernels and addresses. Knows nothing of how experts come there.
"""

import ctypes
from ctypes import c_int64
from typing import NamedTuple

import numpy as np
import torch

from moeflow.kernels.cpu import checks
from moeflow.kernels.cpu.library import loaded
from moeflow.kernels.cpu.ops import failure
from moeflow.kernels.cpu.structs import DTYPES, ExpertKernel

_DONE, _MISSING = 0, 3  # of the library's answers
_SHORT = (torch.int32, torch.int16, torch.int8, torch.uint8)  # whole numbers that routers may use


class LayerOutput(NamedTuple):
    """What a layer's experts gave.

    Args:
        hidden_states: [T, H].
        experts: that were asked for: of one token in the order of K, else by number.
    """

    hidden_states: torch.Tensor
    experts: list[int]


class LayerKernel:
    """The kernels of one layer's experts.

    Args:
        kernels: [E], all of the same H and I.
        activation_bits: as `run_experts` has it.
    """

    def __init__(self, kernels: list[ExpertKernel], activation_bits: int) -> None:
        self._kernels = kernels  # keeps what the pointers point to
        self.pointers = np.array([kernel.pointer for kernel in kernels], np.int64)
        self.activation_bits = activation_bits
        self._pointers_at = self.pointers.ctypes.data
        self._asked = (c_int64 * (len(kernels) + 1))()  # their number first

    def run(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        addresses: np.ndarray,
    ) -> LayerOutput | None:
        """Run the experts and sum them: the bits of `run_experts` and `combine`. One thread at a time.

        Args:
            hidden_states: [T, H].
            top_k_index: [T, K], whole numbers; E or more means none.
            top_k_weights: [T, K].
            addresses: [E] int64, where each expert's record starts in memory; 0 where it is not there.

        Returns:
            The outputs; None where an expert that is asked for is not in memory, or has a negative number.

        Raises:
            ConfigError: a tensor, count or number that does not fit the others.
            MemoryError: no memory for the activations.
        """
        num_experts = len(self.pointers)
        if top_k_index.dtype in _SHORT:
            top_k_index = top_k_index.long()
        if top_k_weights.dtype is torch.float64:  # as some routers compute
            top_k_weights = top_k_weights.float()
        if not checks.takes_layer(hidden_states, top_k_index, top_k_weights):
            wanted = "tokens [T, H], experts [T, K] and weights [T, K]"
            raise checks.refusal("a layer's experts", wanted, hidden_states, top_k_index, top_k_weights)
        if addresses.dtype != np.int64 or addresses.shape != (num_experts,) or not addresses.flags.c_contiguous:
            found = torch.from_numpy(addresses)
            raise checks.refusal(f"addresses of {num_experts} experts", f"int64 [{num_experts}]", found)
        hidden_states, weights = hidden_states.contiguous(), top_k_weights.contiguous()
        index, (num_tokens, top_k) = top_k_index.contiguous(), top_k_index.shape
        out = torch.empty_like(hidden_states)
        asked = ctypes.addressof(self._asked)
        # One token is soon done: to let go of the interpreter lock and take it again would delay it.
        functions = loaded().held if num_tokens == 1 else loaded().free
        status = functions.moeflow_cpu_layer(
            self._pointers_at, addresses.ctypes.data, num_experts, index.data_ptr(),
            weights.data_ptr(), DTYPES[weights.dtype], hidden_states.data_ptr(), DTYPES[hidden_states.dtype],
            num_tokens, top_k, hidden_states.shape[1], out.data_ptr(), asked + 8, asked, self.activation_bits,
            torch.get_num_threads(),
        )  # fmt: skip
        if status == _DONE:
            return LayerOutput(out, self._asked[1 : 1 + self._asked[0]])
        if status == _MISSING:
            return None
        raise failure(status, f"{num_tokens} tokens of {num_experts} experts")
