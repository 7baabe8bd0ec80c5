"""Random blocks of GGML's types: any codes, with scales of a usual size."""

import torch

from moeflow.kernels.quantization.formats import FORMATS, WeightFormat

_HALVES = {
    "q4_1": (0, 2), "q5_1": (0, 2), "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
    "tq1_0": (52,), "tq2_0": (64,), "iq1_m": (), "ggml_mxfp4": (), "ggml_nvfp4": (),
}  # fmt: skip
"""Where the halves of a block are; at its start where nothing is said."""

BLOCKS = tuple(name for name, spec in FORMATS.items() if spec.kind == "ggml")
WITH_KERNELS = (
    "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "ggml_mxfp4",
)  # fmt: skip


def tame(blocks: torch.Tensor, spec: WeightFormat, generator: torch.Generator) -> None:
    """Give random bytes [N, bytes] scales of a usual size, in place."""
    each = blocks.view(-1, spec.block_bytes)
    for at in _HALVES.get(spec.name, (0,)):
        halves = (torch.rand(len(each), 1, generator=generator) + 0.1) * 0.02 / 2**spec.bits
        halves *= torch.randint(0, 2, halves.shape, generator=generator) * 2 - 1
        each[:, at : at + 2] = halves.half().view(torch.uint8)
    if spec.name == "iq1_m":  # whose half lies in the upper bits of four words
        each[:, 55] = each[:, 55] & 15 | 16
    if spec.name == "ggml_mxfp4":
        each[:, 0] = torch.randint(116, 122, (len(each),), generator=generator)


def random_matrix(name: str, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Return a random matrix [N, K] in blocks, uint8 [N, bytes]."""
    generator, spec = torch.Generator().manual_seed(seed), FORMATS[name]
    ((_, _, size),) = spec.tensors("", shape)
    blocks = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    tame(blocks, spec, generator)
    return blocks
