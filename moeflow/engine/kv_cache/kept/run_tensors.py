"""Names, shapes and dtypes of a run's tensors in a file.

Those of a window have the first position's number at the end of their names.
"""

import torch

from moeflow.engine.kv_cache.kept.kept_runs import Run
from moeflow.engine.kv_cache.layer_shape import LayerShape
from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.engine.kv_cache.windows import Stretch, WindowPart

Layout = dict[int, LayerShape]


def plain_layers(layout: Layout) -> Layout:
    """Return the layers without a window."""
    return {layer: shape for layer, shape in layout.items() if not shape.window}


def windowed_layers(layout: Layout) -> Layout:
    """Return the layers with a window."""
    return {layer: shape for layer, shape in layout.items() if shape.window}


def wanted(
    num_tokens: int, parts: list[Stretch], layout: Layout
) -> dict[str, tuple[tuple[int, ...], torch.dtype, torch.device]]:
    """Return shape, dtype and device of each tensor of a run, by its name.

    Args:
        num_tokens: of the run.
        parts: what is kept of it in layers with a window.
        layout: of all layers.
    """
    found = _wanted("", num_tokens, plain_layers(layout))
    for begin, end in parts:
        found |= _wanted(f".{begin}", end - begin, windowed_layers(layout))
    return found


def named(run: Run) -> dict[str, torch.Tensor]:
    """Name the tensors of a run."""
    found: dict[str, torch.Tensor] = {}
    of_window = [(f".{part.begin}", part.keys, part.values) for part in run.parts]
    for suffix, keys, values in [("", run.slot.keys, run.slot.values), *of_window]:
        for name, tensors in (("keys", keys), ("values", values)):
            found |= {f"{layer}.{name}{suffix}": tensor for layer, tensor in tensors.items()}
    return found


def kept_of(
    tensors: dict[str, torch.Tensor], num_tokens: int, parts: list[Stretch], layout: Layout
) -> tuple[KeyValueSlot, list[WindowPart]]:
    """Return slot and windows of which these are the tensors, on the layers' devices."""
    slot = KeyValueSlot(*_both("", tensors, plain_layers(layout)), num_tokens)
    windowed = windowed_layers(layout)
    return slot, [WindowPart(begin, end, *_both(f".{begin}", tensors, windowed)) for begin, end in parts]


def _wanted(
    suffix: str, num_positions: int, layout: Layout
) -> dict[str, tuple[tuple[int, ...], torch.dtype, torch.device]]:
    return {
        f"{layer}.{name}{suffix}": ((1, heads, num_positions, width), shape.kept[2], shape.device)
        for layer, shape in layout.items()
        for name, (heads, width) in (("keys", shape.kept[0]), ("values", shape.kept[1]))
    }


def _both(
    suffix: str, tensors: dict[str, torch.Tensor], layout: Layout
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    keys, values = (
        {layer: tensors[f"{layer}.{name}{suffix}"].to(shape.device) for layer, shape in layout.items()}
        for name in ("keys", "values")
    )
    return keys, values
