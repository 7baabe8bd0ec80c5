"""Figures of placements: load per GPU and layer, bytes between GPUs, crossing over imbalance.

Looks as `replay.plots` does. Takes plain arrays; knows nothing of solvers.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from moeflow.replay.plots import FAINT, INK, MARKERS, OTHER_COLOURS, plain_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BEFORE, _AFTER = "contiguous", "this plan"
_COLOURS = (*OTHER_COLOURS[4:], *OTHER_COLOURS[:4], FAINT, INK)
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))


def load_figure(before: np.ndarray, after: np.ndarray, names: tuple[str, str] = (_BEFORE, _AFTER)) -> "Figure":
    """Draw each GPU's load in each layer, of two plans.

    Args:
        before: [L, G], tokens each GPU serves.
        after: [L, G], of the other plan.
        names: of the plans.
    """
    with plain_style():
        figure, axes = _pair(float(np.clip(1.9 + len(before) * 0.09, 3.2, 8.0)))
        _draw_loads(figure, axes, (before, after), names)
    return figure


def traffic_figure(before: np.ndarray, after: np.ndarray, names: tuple[str, str] = (_BEFORE, _AFTER)) -> "Figure":
    """Draw the bytes that go from GPU to GPU in a step, of two plans; what stays on a GPU is left blank.

    Args:
        before: [G, G], bytes from row to column.
        after: [G, G], of the other plan.
        names: of the plans.
    """
    with plain_style():
        figure, axes = _pair(4.0)
        _draw_traffic(figure, axes, (before, after), names)
    return figure


def placement_figure(
    loads: tuple[np.ndarray, np.ndarray],
    traffic: tuple[np.ndarray, np.ndarray],
    names: tuple[str, str] = (_BEFORE, _AFTER),
) -> "Figure":
    """Draw `load_figure` above `traffic_figure`, in one figure.

    Args:
        loads: before and after, [L, G] each.
        traffic: before and after, [G, G] each.
        names: of the plans.
    """
    from matplotlib.figure import Figure

    with plain_style():
        height = float(np.clip(1.6 + len(loads[0]) * 0.09, 2.8, 6.0))
        figure = Figure(figsize=(8.4, height + 3.9), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=(height, 3.9))  # [2] figures: its own type is wider
        top, bottom = parts
        _draw_loads(top, top.subplots(1, 2, sharey=True), loads, names)
        _draw_traffic(bottom, bottom.subplots(1, 2, sharey=True), traffic, names)
    return figure


def pareto_figure(
    curves: dict[str, list[tuple[float, float]]], points: dict[str, tuple[float, float]], title: str
) -> "Figure":
    """Draw crossing over imbalance: what a plan gives up in one for the other.

    Args:
        curves: name -> (imbalance, crossing) of plans that one method finds; a name that ends in "held out" is dashed
            in the colour of the name without it.
        points: name -> (imbalance, crossing) of single plans; a name that ends in "held out" is hollow likewise.
        title: above the figure.
    """
    from matplotlib.figure import Figure

    with plain_style():
        figure = Figure(figsize=(7.2, 4.8), layout="constrained")
        axes = figure.subplots()
        colours: dict[str, str] = {}
        for name in [*curves, *points]:
            colours.setdefault(_base(name), _COLOURS[len(colours) % len(_COLOURS)])
        for name, curve in curves.items():
            xs, ys = zip(*sorted(curve), strict=True)
            dashes = (0, (4, 2)) if _is_held_out(name) else "-"
            axes.plot(
                xs, ys, color=colours[_base(name)], linewidth=1.8, linestyle=dashes, marker="o", markersize=3.5,
                label=name, zorder=3,
            )  # fmt: skip
        bases = list(colours)
        for name, (x, y) in points.items():
            colour = colours[_base(name)]
            marker = MARKERS[1 + bases.index(_base(name)) % (len(MARKERS) - 1)]
            axes.plot(
                [x], [y], color=colour, marker=marker, markersize=8, linestyle="none", label=name, zorder=4,
                markerfacecolor="white" if _is_held_out(name) else colour,
            )  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel("imbalance: busiest GPU over the mean")
        axes.set_ylabel("transitions that change GPU")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(color=FAINT, alpha=0.25, linewidth=0.8)
        axes.margins(0.06)
        figure.legend(loc="outside right upper", frameon=False, fontsize=9, handlelength=2.8)
    return figure


def _pair(height: float) -> "tuple[Figure, np.ndarray]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, height), layout="constrained")
    return figure, figure.subplots(1, 2, sharey=True)


def _draw_loads(figure, axes, loads, names) -> None:
    ratios = [load / load.mean(axis=1, keepdims=True) for load in loads]
    # White is even; both plans share the scale, which is symmetric.
    reach = max(0.05, *(float(np.abs(ratio - 1).max()) for ratio in ratios))
    for place, ratio, name in zip(axes, ratios, names, strict=True):
        extent = (-0.5, ratio.shape[1] - 0.5, len(ratio) - 0.5, -0.5)
        image = place.imshow(
            ratio, aspect="auto", cmap="RdBu_r", interpolation="none", vmin=1 - reach, vmax=1 + reach, extent=extent
        )
        place.set_title(f"{name}: imbalance {ratio.max(axis=1).mean():.2f}")
        place.set_xlabel("GPU")
        _plain(place)
    axes[0].set_ylabel("MoE layer")
    _bar(figure, image, axes, "load over the layer's mean")


def _draw_traffic(figure, axes, traffic, names) -> None:
    away = [np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix) for matrix in traffic]
    highest = max((float(np.nanmax(matrix)) for matrix in away if len(matrix) > 1), default=0.0) or 1.0
    scale, unit = _unit_of(highest)
    for place, matrix, name in zip(axes, away, names, strict=True):
        image = place.imshow(matrix / scale, cmap="viridis", interpolation="none", vmin=0, vmax=highest / scale)
        total = float(np.nansum(matrix))
        total_scale, total_unit = _unit_of(total)
        place.set_title(f"{name}: {total / total_scale:.3g} {total_unit} cross")
        place.set_xlabel("to GPU")
        if len(matrix) <= 8:
            for (source, target), value in np.ndenumerate(matrix):
                if source != target:
                    ink = "white" if value < 0.6 * highest else INK
                    place.text(target, source, f"{value / scale:.3g}", ha="center", va="center", color=ink, fontsize=8)
        _plain(place)
    axes[0].set_ylabel("from GPU")
    _bar(figure, image, axes, f"{unit} a step")


def _unit_of(num_bytes) -> tuple[float, str]:
    return next((pair for pair in _UNITS if num_bytes >= pair[0]), _UNITS[-1])


def _plain(axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)


def _bar(figure, image, axes, label) -> None:
    bar = figure.colorbar(image, ax=list(axes), pad=0.02, fraction=0.04)
    bar.set_label(label)
    bar.outline.set_visible(False)


def _is_held_out(name) -> bool:
    return name.endswith("held out")


def _base(name) -> str:
    return name.removesuffix("held out").rstrip(", ") if _is_held_out(name) else name
