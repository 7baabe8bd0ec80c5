"""Figures of placements: what is drawn is what was given, both plans on one scale, the same bytes each time."""

from itertools import pairwise

import numpy as np
import pytest

from moeflow.cli.place_plots import load_figure, pareto_figure, placement_figure, traffic_figure
from moeflow.replay.plots import save_figure

LOADS = np.array([[3.0, 1.0], [2.0, 2.0]]), np.array([[2.0, 2.0], [1.5, 2.5]])
TRAFFIC = np.array([[9e9, 3e6], [1e6, 9e9]]), np.array([[9e9, 2e6], [0, 9e9]])
CURVES = {"joint": [(1.2, 0.5), (1.0, 0.6)], "joint, held out": [(1.05, 0.61), (1.25, 0.52)]}
POINTS = {"greedy": (1.0, 0.75), "greedy, held out": (1.03, 0.75), "random": (1.3, 0.76)}


def images(figure):
    return [axes.images[0] for axes in figure.axes if axes.images and axes.get_title(loc="left")]


def test_load_is_drawn_over_its_layers_mean_on_one_scale():
    before, after = images(load_figure(*LOADS))
    np.testing.assert_allclose(before.get_array(), [[1.5, 0.5], [1, 1]])
    np.testing.assert_allclose(after.get_array(), [[1, 1], [0.75, 1.25]])
    assert before.get_clim() == after.get_clim() == (0.5, 1.5)


def test_traffic_leaves_out_what_stays_and_says_what_crosses():
    figure = traffic_figure(*TRAFFIC)
    before, after = images(figure)
    np.testing.assert_allclose(before.get_array().filled(np.nan), [[np.nan, 3], [1, np.nan]])
    np.testing.assert_allclose(after.get_array().filled(np.nan), [[np.nan, 2], [0, np.nan]])
    assert before.get_clim() == after.get_clim() == (0, 3)
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == [
        "contiguous: 4 MB cross",
        "this plan: 2 MB cross",
    ]
    assert {text.get_text() for text in figure.axes[0].texts} == {"3", "1"}


def test_one_figure_can_show_both():
    figure = placement_figure(LOADS, TRAFFIC, ("greedy", "joint"))
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert titles == [
        "greedy: imbalance 1.25",
        "joint: imbalance 1.12",
        "greedy: 4 MB cross",
        "joint: 2 MB cross",
    ]


def test_curves_are_drawn_by_rising_imbalance_and_held_out_has_its_methods_colour():
    figure = pareto_figure(CURVES, POINTS, "title")
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert set(lines) == {*CURVES, *POINTS}
    for name, curve in CURVES.items():
        assert list(zip(*lines[name].get_data(), strict=True)) == sorted(curve)
    for name, point in POINTS.items():
        assert tuple(float(value[0]) for value in lines[name].get_data()) == point
    for name in ("joint", "greedy"):
        assert lines[name].get_color() == lines[f"{name}, held out"].get_color()
    assert lines["greedy, held out"].get_markerfacecolor() == "white"
    assert len({lines[name].get_color() for name in ("joint", "greedy", "random")}) == 3
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {*CURVES, *POINTS}


def test_nothing_overlaps_or_is_cut_off():
    points = {f"solver {number}": (1 + number / 9, 0.7) for number in range(8)}
    figure = pareto_figure(CURVES, points, "title")
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in figure.legends[0].get_texts()), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)
    assert figure.legends[0].get_window_extent().x0 >= figure.axes[0].get_window_extent().x1


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_same_plans_give_the_same_bytes(tmp_path, suffix):
    for name in "ab":
        save_figure(placement_figure(LOADS, TRAFFIC), tmp_path / f"{name}1.{suffix}")
        save_figure(pareto_figure(CURVES, POINTS, "title"), tmp_path / f"{name}2.{suffix}")
    for number in (1, 2):
        one, other = ((tmp_path / f"{name}{number}.{suffix}").read_bytes() for name in "ab")
        assert one == other


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_gpus", [1, 3, 64])
def test_any_number_of_gpus_can_be_drawn_even_if_nothing_crosses(tmp_path, num_gpus):
    load, still = np.ones((2, num_gpus)), np.eye(num_gpus)
    save_figure(placement_figure((load, load), (still, still)), tmp_path / "a.png")
    save_figure(load_figure(load, load), tmp_path / "b.png")
    save_figure(pareto_figure({}, {"one": (1, 0)}, "title"), tmp_path / "c.png")
