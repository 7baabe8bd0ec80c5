"""Sizes of models that are nowhere, with round figures."""

from moeflow.fit.config_facts import Attention, ConfigFacts
from moeflow.fit.formats import published_as
from moeflow.fit.sizes import LayerExperts, ModelSizes


def small_sizes(
    *,
    layers: int = 4,
    experts: int = 8,
    top_k: int = 2,
    dense: int = 4 << 20,
    shapes: tuple[tuple[int, ...], ...] = ((64, 4096),) * 3,
    values: int = 128,
) -> ModelSizes:
    """A model in bfloat16 whose experts are matrices of these shapes."""
    num_bytes = sum(2 * rows * columns for rows, columns in shapes)
    layer = LayerExperts(experts, shapes, num_bytes, num_bytes, num_bytes, 1)
    config = ConfigFacts(
        "mixtral", "0" * 16, layers, experts, top_k, 64, 128, "BF16", 4096, False,
        Attention((values,) * layers, (0,) * layers),
    )  # fmt: skip
    return ModelSizes(config, (layer,) * layers, dense, dense, dense, "BF16", published_as("bf16"), 1)
