"""Figures: right kind of file, the same bytes each time, every policy named, colours that follow the page."""

import os
import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from helpers.paths import ROOT
from moeflow.errors import ConfigError
from moeflow.replay.plots import heat_map_figure, hit_rate_figure, page_svg, recall_figure, save_figure

ROWS = [
    {"policy": policy, "residency": residency, "hit_rate": rate}
    for policy, rates in {"lru": (0.4, 0.8), "lfru": (0.5, 0.81), "belady": (0.6, 0.9), "mine": (0.5, 0.8)}.items()
    for residency, rate in zip((15, 45), rates, strict=True)
]


def labels_of(figure):
    return {text.get_text(): text for text in figure.axes[0].texts}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "begin"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml")])
def test_plot_is_of_the_kind_its_name_says_and_leaves_nothing_else(tmp_path, name, begin):
    save_figure(hit_rate_figure(ROWS), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begin)
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_same_rows_give_the_same_bytes_whatever_the_users_settings(tmp_path, suffix):
    import matplotlib

    demand = np.arange(12.0).reshape(3, 4)
    for name, settings in (("a", {}), ("b", {"font.size": 30, "axes.facecolor": "red"})):
        with matplotlib.rc_context(settings):
            save_figure(hit_rate_figure(ROWS), tmp_path / f"{name}1.{suffix}")
            save_figure(heat_map_figure(demand), tmp_path / f"{name}2.{suffix}")
    for number in (1, 2):
        one, other = ((tmp_path / f"{name}{number}.{suffix}").read_bytes() for name in "ab")
        assert one == other
    assert b"<dc:date>" not in (tmp_path / f"a1.{suffix}").read_bytes()


def test_lines_have_the_rows_values_and_a_label_each():
    figure = hit_rate_figure(ROWS, [{"policy": "forecast", "residency": 30, "hit_rate": 0.7}])
    lines = {tuple(line.get_xdata()): line for line in figure.axes[0].lines if len(line.get_xdata()) == 1}
    assert lines[(30,)].get_ydata().tolist() == [0.7]
    drawn = [line.get_ydata().tolist() for line in figure.axes[0].lines]
    for rates in ([0.4, 0.8], [0.5, 0.81], [0.6, 0.9], [0.5, 0.8]):
        assert rates in drawn
    expected = {"LRU", "LFRU", "Belady (bound)", "mine", "forecast (realised)", "random routing"}
    assert set(labels_of(figure)) == expected


def test_random_routing_is_drawn_where_hits_equal_residency():
    line = hit_rate_figure(ROWS).axes[0].lines[0]
    np.testing.assert_allclose(np.array(line.get_xdata()) / 100, line.get_ydata())


def test_labels_do_not_overlap_and_nothing_is_cut_off():
    rows = [{"policy": f"policy-{n}", "residency": r, "hit_rate": 0.95} for n in range(8) for r in (10, 90)]
    figure = hit_rate_figure(rows)
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in labels_of(figure).values()), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes))
    assert all(box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)


def test_one_row_is_enough_for_a_plot(tmp_path):
    save_figure(hit_rate_figure(ROWS[:1]), tmp_path / "a.svg")


def test_heat_map_shows_shares_of_each_layers_own_demand():
    demand = np.array([[1.0, 3.0], [300.0, 100.0], [0.0, 0.0], [5.0, np.nan]])
    image = heat_map_figure(demand).axes[0].images[0].get_array()
    np.testing.assert_allclose(image.filled(np.nan), [[25, 75], [75, 25], [0, 0], [100, np.nan]])


def test_recall_is_drawn_by_distance_as_a_number():
    line = recall_figure({"markov": {"10": 0.3, "2": 0.5, "1": 0.6}}).axes[0].lines[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2, 10], [0.6, 0.5, 0.3])


def test_page_svg_is_one_element_in_the_pages_ink_without_network():
    text = page_svg(hit_rate_figure(ROWS), 'rates <of "mine">')
    assert text.startswith("<svg")
    assert text.rstrip().endswith("</svg>")
    assert "currentColor" in text
    assert "#010203" not in text
    assert 'aria-label="rates &lt;of &quot;mine&quot;&gt;"' in text
    links = re.findall(r'(?:href|src)="([^"]{1,20})', text)
    assert all(link.startswith(("#", "data:")) for link in links)


@pytest.mark.parametrize("name", ["plot.pdf", "plot", "png"])
def test_other_kinds_of_plot_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"Allowed: a name that ends in \.png or \.svg"):
        save_figure(hit_rate_figure(ROWS), tmp_path / name)


def test_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere/a\.png cannot be written"):
        save_figure(hit_rate_figure(ROWS), tmp_path / "nowhere" / "a.png")


@pytest.mark.slow
def test_a_backend_of_the_notebook_that_started_the_process_is_no_matter():
    program = (
        "import os; from moeflow.replay.plots import hit_rate_figure; "
        "hit_rate_figure([{'policy': 'lru', 'residency': 50, 'hit_rate': 0.5}]); print(os.environ['MPLBACKEND'])"
    )
    backend = "module://no_such_package.backend_inline"
    environment = {**os.environ, "MPLBACKEND": backend, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{backend}\n", "")


def test_without_matplotlib_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        hit_rate_figure(ROWS)
