"""GGML's blocks: their sizes are those of the package gguf, and their values have its bits."""

import gguf
import numpy as np
import pytest
import torch

from moeflow.errors import ConfigError
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import FORMATS, WRITABLE, find_format
from moeflow.kernels.quantization.ggml import BLOCK_TYPES
from moeflow.kernels.quantization.ggml_values import block_values

BLOCKS = {kind.format: kind for kind in BLOCK_TYPES.values() if kind.format and kind.block_values > 1}


def of_gguf(blocks, kind):
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(kind.number)))


def random_blocks(kind, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, kind.block_bytes), dtype=torch.uint8, generator=generator)


def test_sizes_and_numbers_are_those_of_gguf():
    wanted = {kind.name: (kind.value, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {kind.name: kind[1:4] for kind in BLOCK_TYPES.values() if kind.name in wanted} == wanted
    assert all(name == kind.name for name, kind in BLOCK_TYPES.items())


def test_every_format_of_a_type_is_in_the_table_and_none_is_written():
    for kind in BLOCK_TYPES.values():
        if kind.format:
            assert find_format(kind.format).num_bytes((3, 4 * kind.block_values)) == 12 * kind.block_bytes
    assert {name for name, spec in FORMATS.items() if spec.kind == "ggml"} == set(BLOCKS)
    assert not set(BLOCKS) & set(WRITABLE)


def test_a_matrix_is_one_tensor_of_whole_blocks():
    assert find_format("q4_k").tensors("w", (3, 512)) == [("w", "U8", (3, 288))]
    with pytest.raises(ConfigError, match=r"rows of 300 values .* multiples of 256"):
        find_format("q4_k").tensors("w", (3, 300))


@pytest.mark.parametrize("name", BLOCKS)
def test_values_have_the_bits_of_gguf(name):
    kind = BLOCKS[name]
    blocks = random_blocks(kind, 3000)  # halves of every size, NaN and infinity among them
    found, expected = block_values(blocks, name).nan_to_num(12.5), of_gguf(blocks, kind).nan_to_num(12.5)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_matrix_is_read_row_by_row(name):
    kind = BLOCKS[name]
    blocks = random_blocks(kind, 6).view(3, -1)
    found = dequantize({"w": blocks}, "w", find_format(name), (3, 2 * kind.block_values))
    assert torch.equal(found.nan_to_num(), of_gguf(blocks, kind).nan_to_num())
    odd = torch.cat((blocks.new_zeros(1), blocks.flatten()))[1:].view(3, -1)  # at an odd address
    assert torch.equal(block_values(odd, name).nan_to_num(), found.nan_to_num())
