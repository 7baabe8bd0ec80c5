"""GGML's tensor types: how many values a block has, and how many bytes.

A GGUF file stores a row as blocks that follow one another, each with its own scales. The names and numbers are those of
GGML. `quantization/ggml_values.py` says what the bytes of a block mean.

Knows names and sizes. Knows nothing of tensors or files.
"""

from typing import NamedTuple


class BlockType(NamedTuple):
    """One type of a GGUF file's tensors.

    Args:
        name: GGML's, in capitals.
        number: GGML's, as files have it.
        block_values: neighbours in a row that lie in one block.
        block_bytes: bytes of a block.
        format: the weight format of `quantization/formats.py` that has these bytes; empty where there is none.
    """

    name: str
    number: int
    block_values: int
    block_bytes: int
    format: str


BLOCK_TYPES: dict[str, BlockType] = {
    row[0]: BlockType(*row)
    for row in (
        ("F32", 0, 1, 4, "float32"),
        ("F16", 1, 1, 2, "float16"),
        ("Q4_0", 2, 32, 18, "q4_0"),
        ("Q4_1", 3, 32, 20, "q4_1"),
        ("Q5_0", 6, 32, 22, "q5_0"),
        ("Q5_1", 7, 32, 24, "q5_1"),
        ("Q8_0", 8, 32, 34, "q8_0"),
        ("Q8_1", 9, 32, 40, ""),
        ("Q2_K", 10, 256, 84, "q2_k"),
        ("Q3_K", 11, 256, 110, "q3_k"),
        ("Q4_K", 12, 256, 144, "q4_k"),
        ("Q5_K", 13, 256, 176, "q5_k"),
        ("Q6_K", 14, 256, 210, "q6_k"),
        ("Q8_K", 15, 256, 292, ""),
        ("IQ2_XXS", 16, 256, 66, "iq2_xxs"),
        ("IQ2_XS", 17, 256, 74, "iq2_xs"),
        ("IQ3_XXS", 18, 256, 98, "iq3_xxs"),
        ("IQ1_S", 19, 256, 50, "iq1_s"),
        ("IQ4_NL", 20, 32, 18, "iq4_nl"),
        ("IQ3_S", 21, 256, 110, "iq3_s"),
        ("IQ2_S", 22, 256, 82, "iq2_s"),
        ("IQ4_XS", 23, 256, 136, "iq4_xs"),
        ("I8", 24, 1, 1, ""),
        ("I16", 25, 1, 2, ""),
        ("I32", 26, 1, 4, ""),
        ("I64", 27, 1, 8, ""),
        ("F64", 28, 1, 8, "float64"),
        ("IQ1_M", 29, 256, 56, "iq1_m"),
        ("BF16", 30, 1, 2, "bfloat16"),
        ("TQ1_0", 34, 256, 54, "tq1_0"),
        ("TQ2_0", 35, 256, 66, "tq2_0"),
        ("MXFP4", 39, 32, 17, "ggml_mxfp4"),
        ("NVFP4", 40, 64, 36, "ggml_nvfp4"),
        ("Q1_0", 41, 128, 18, ""),
    )
}
