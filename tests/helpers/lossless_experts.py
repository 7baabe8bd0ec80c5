"""Experts of any bfloat16 bits, and the same experts in the lossless format."""

import torch

from helpers.cpu_experts import SILU, TORCH, Expert
from moeflow.core import MatrixSpec, RecordLayout
from moeflow.kernels.cpu.lossless import encode
from moeflow.kernels.cpu.structs import ExpertKernel
from moeflow.kernels.quantization.formats import lossless_format
from moeflow.kernels.quantization.lossless import encode_lossless

DTYPES = {**TORCH, "U16": torch.uint16}


def any_bits(shape, seed, spread=0):
    """bfloat16 values [N, K]: of normal size, but for `spread` of each row's, which have any bits."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=generator) * 0.1).bfloat16()
    bits = torch.randint(-(1 << 15), 1 << 15, shape, generator=generator).to(torch.int16)
    is_any = torch.rand(shape, generator=generator) < spread
    return torch.where(is_any, bits, weight.view(torch.int16)).view(torch.bfloat16)


def extreme(shape, seed):
    """Finite bfloat16 values [N, K], small and large ones and zeros in some of the rows, so that these have escapes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.1
    powers = torch.randint(-100, 3, shape, generator=generator).float().exp2()
    chosen = (torch.rand(shape, generator=generator) < 0.05) & (torch.rand(shape[0], 1, generator=generator) < 0.5)
    weight = torch.where(chosen, weight * powers * (torch.rand(shape, generator=generator) < 0.8), weight)
    return weight.bfloat16()


class LosslessExpert:
    """One expert whose matrices are stored without loss; its record's bytes lie at an address.

    Args:
        floats: the same expert in bfloat16.
        spare: unused escapes of each matrix.
        memory: uint8, where the record is to begin; memory of its own when None.
    """

    def __init__(self, floats, spare=0, memory=None):
        tensors, matrices = [], []
        self.expected = floats.expected
        for tensor in floats.record.tensors:
            if tensor.name not in floats.shapes:
                tensors.append((tensor.name, tensor.dtype, tensor.shape))
                continue
            room = encode_lossless(floats.tensors[tensor.name])[2].numel() // 5 + spare
            spec = lossless_format(room)
            tensors += spec.tensors(tensor.name, tensor.shape)
            matrices.append(MatrixSpec(tensor.name, spec.name, tensor.shape))
        self.record, self.activation = RecordLayout.pack(tensors, tuple(matrices)), floats.activation
        if memory is None:
            self._memory = torch.zeros(self.record.num_bytes + 64, dtype=torch.uint8)
            memory = self._memory[-self._memory.data_ptr() % 64 :]
        self.address, self.tensors = memory.data_ptr(), {}
        for tensor in self.record.tensors:
            values = memory[tensor.offset : tensor.offset + tensor.num_bytes].view(DTYPES[tensor.dtype])
            self.tensors[tensor.name] = values.view(tensor.shape)
        for name, values in floats.tensors.items():
            if name in floats.shapes:
                encode(values, *(self.tensors[f"{name}{part}"] for part in ("", "_top", "_escapes")))
            else:
                self.tensors[name].copy_(values)

    @property
    def kernel(self):
        return ExpertKernel.build(self.record, self.activation, is_transposed=False)


def both(seed, shape, activation=SILU, *, has_bias=False, spare=0, make=extreme):
    """Return an expert in bfloat16 and the same without loss."""
    floats = Expert(seed, "bfloat16", shape, activation, has_bias=has_bias)
    for name, size in floats.shapes.items():
        floats.tensors[name].copy_(make(size, seed + len(name)))
    return floats, LosslessExpert(floats, spare)
