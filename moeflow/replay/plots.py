"""Figures of routing and caches: hit rate over residency, demand by layer and expert, recall by distance.

Takes plain rows and arrays; knows nothing of traces. The same input gives the same
bytes. In SVG made for a page, ink takes the colour of the page's text.
"""

import io
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moeflow.atomic_file import check_target, write_atomically
from moeflow.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours, distinct to colour-blind readers; a policy has the same colour in every figure.
_COLOURS = {
    "lru": "#56B4E9", "lfu": "#E69F00", "lfru": "#0072B2", "belady": "#009E73", "static": "#CC79A7",
    "popularity": "#D55E00", "random": "#8C8C8C",
}  # fmt: skip
OTHER_COLOURS = ("#D55E00", "#CC79A7", "#56B4E9", "#E69F00", "#0072B2", "#009E73")
_NAMES = {"lru": "LRU", "lfu": "LFU", "lfru": "LFRU", "belady": "Belady (bound)"}
MARKERS = "osD^vPX<>*"
# Black in files; `page_svg` finds and replaces it: no other part of a figure has it.
INK = "#010203"
FAINT = "#8c8d8f"
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10.0, "axes.titlesize": 11.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 10.0, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "svg.hashsalt": "moeflow", "svg.fonttype": "path",
}  # fmt: skip


def hit_rate_figure(rows: Sequence[dict], realised: Sequence[dict] = ()) -> "Figure":
    """Draw hit rate over residency, one line a policy, and the hit rate of random routing.

    Args:
        rows: policy, residency (percent) and hit_rate (0 to 1) of each, as `replay_trace` returns them.
        realised: rows of the same form that were measured, drawn heavier.
    """
    with plain_style():
        figure, axes = _figure(7.2, 4.4)
        last = max(row["residency"] for row in [*rows, *realised])
        first = min(row["residency"] for row in [*rows, *realised])
        span = max(last - first, 1)
        axes.set_xlim(max(0, first - 0.06 * span), last)
        axes.set_ylim(0, 1)
        edge = axes.get_xlim()[0] / 100, last / 100
        axes.plot(axes.get_xlim(), edge, color=FAINT, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
        labels = [(last / 100, "random routing", FAINT)]
        others = iter(OTHER_COLOURS * 4)
        lines = [(policy, points, False) for policy, points in _by_policy(rows).items()]
        lines += [(policy, points, True) for policy, points in _by_policy(realised).items()]
        for number, (policy, points, measured) in enumerate(lines):
            colour = INK if measured else _COLOURS.get(policy) or next(others)
            x, y = zip(*points, strict=True)
            axes.plot(
                x, y, color=colour, linewidth=2.6 if measured else 1.8, marker=MARKERS[number % len(MARKERS)],
                markersize=6, clip_on=False, zorder=4 if measured else 3,
            )  # fmt: skip
            name = _NAMES.get(policy, policy) + (" (realised)" if measured else "")
            labels.append((y[-1], name, colour))
        _label_lines(figure, axes, labels)
        axes.set_title("What a cache of this size hits")
        axes.set_xlabel("residency, % of all experts")
        axes.set_ylabel("hit rate")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.8)
    return figure


def heat_map_figure(demand: np.ndarray) -> "Figure":
    """Draw each expert's share of its layer's demand.

    Args:
        demand: [L, E], uses of each expert; NaN where a layer has no such expert.
    """
    with plain_style():
        num_layers, num_experts = demand.shape
        figure, axes = _figure(7.2, float(np.clip(1.6 + num_layers * 0.14, 2.4, 8.0)))
        totals = np.nansum(demand, axis=1, keepdims=True)
        share = 100 * np.divide(demand, totals, out=np.zeros(demand.shape), where=totals > 0)
        # The hottest hundredth would leave the rest dark.
        top = float(np.nanpercentile(share, 99)) or 1.0
        extent = (-0.5, num_experts - 0.5, num_layers - 0.5, -0.5)
        image = axes.imshow(share, aspect="auto", cmap="viridis", interpolation="none", vmin=0, vmax=top, extent=extent)
        extend = "max" if np.nanmax(share) > top else "neither"
        bar = figure.colorbar(image, ax=axes, extend=extend, pad=0.02, fraction=0.05)
        bar.set_label("% of the layer's demand")
        bar.outline.set_visible(False)
        axes.set_title(f"Demand by layer and expert (even: {100 / num_experts:.3g} %)")
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        for axis in (axes.xaxis, axes.yaxis):
            _whole_numbers(axis)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def recall_figure(recall_by_distance: dict[str, dict]) -> "Figure":
    """Draw recall over the distance of a prediction in layers.

    Args:
        recall_by_distance: of each predictor, distance in layers -> recall (0 to 1).
    """
    with plain_style():
        figure, axes = _figure(7.2, 3.4)
        labels = []
        for number, (name, recall) in enumerate(recall_by_distance.items()):
            points = sorted((int(distance), value) for distance, value in recall.items())
            x, y = zip(*points, strict=True)
            colour = OTHER_COLOURS[number % len(OTHER_COLOURS)]
            axes.plot(x, y, color=colour, linewidth=1.8, marker=MARKERS[number % len(MARKERS)], clip_on=False)
            labels.append((y[-1], name, colour))
        axes.set_ylim(0, 1)
        axes.margins(x=0)
        _label_lines(figure, axes, labels)
        axes.set_title("Recall by distance")
        axes.set_xlabel("layers ahead")
        axes.set_ylabel("recall")
        _whole_numbers(axes.xaxis)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.8)
    return figure


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure as .png or .svg, whole or not at all.

    Raises:
        ConfigError: another suffix, or a folder that cannot be written.
    """
    kind = check_plot_path(path)
    write_atomically(path, _rendered(figure, kind, facecolor="white"), ConfigError)


def check_plot_path(path: str | Path) -> str:
    """Return the kind of a plot's file, "png" or "svg".

    Raises:
        ConfigError: another suffix, a folder that is not there or not the user's, or matplotlib is absent.
    """
    require_matplotlib()
    kind = Path(path).suffix.lower().lstrip(".")
    if kind not in ("png", "svg"):
        raise ConfigError(f"{path} is no kind of plot. Allowed: a name that ends in .png or .svg.")
    check_target(path, ConfigError)
    return kind


def page_svg(figure: "Figure", label: str) -> str:
    """Return a figure as an SVG element for a page: transparent, ink in the page's text colour, blue in its --blue.

    Args:
        figure: the figure.
        label: text for screen readers.
    """
    text = _rendered(figure, "svg", facecolor="none", transparent=True).decode()
    element = text[text.index("<svg") :].replace(INK, "currentColor").replace("#0072b2", "var(--blue, #0072b2)")
    return element.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def require_matplotlib() -> None:
    """Import matplotlib, though MPLBACKEND may name a backend of the notebook that started this process.

    Raises:
        ConfigError: it is absent; the message says how to install it.
    """
    try:
        try:
            import matplotlib
        except ValueError:
            backend = os.environ.pop("MPLBACKEND")
            try:
                import matplotlib  # noqa: F401
            finally:
                os.environ["MPLBACKEND"] = backend
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib, which is installed with moeflow and is not here: pip install matplotlib."
        ) from error


def plain_style() -> AbstractContextManager[None]:
    """Return matplotlib's settings as a context, free of the user's own."""
    require_matplotlib()
    import matplotlib

    settings: dict[Any, Any] = dict(matplotlib.rcParamsDefault)
    settings |= {**_STYLE, "backend": "agg"}
    return matplotlib.rc_context(settings)


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _rendered(figure: "Figure", kind: str, **options: Any) -> bytes:
    with plain_style():
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata, **options)
    return buffer.getvalue()


def _by_policy(rows: Sequence[dict]) -> dict[str, list[tuple[float, float]]]:
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault(row["policy"], []).append((row["residency"], row["hit_rate"]))
    return {policy: sorted(of_policy) for policy, of_policy in points.items()}


def _whole_numbers(axis: "Axis") -> None:
    locator = axis.get_major_locator()
    locator.set_params(integer=True)  # type: ignore[call-arg]  # an axis begins with an AutoLocator, which takes it


def _label_lines(figure: "Figure", axes: "Axes", labels: list[tuple[float, str, str]]) -> None:
    """Write (height, name, colour) beside the right edge of axes that reach from 0 to 1, none over another."""
    gap = 13 / (figure.get_figheight() * 72 * 0.8)  # one line of text, in heights of the axes
    labels = sorted(labels, key=lambda label: label[0])
    # Less a gap for each label below, heights need only rise: neighbours that do not are set to their mean.
    groups: list[list[float]] = []
    for place, (value, _, _) in enumerate(labels):
        groups.append([value - place * gap])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    risen = [float(np.mean(group)) for group in groups for _ in group]
    highest = 1.02 - (len(labels) - 1) * gap
    for place, (height, (_, name, colour)) in enumerate(zip(risen, labels, strict=True)):
        axes.annotate(
            name, (1, min(height, highest) + place * gap), (10, 0), xycoords="axes fraction",
            textcoords="offset points", va="center", color=colour, fontweight="bold", fontsize=9.5,
        )  # fmt: skip
